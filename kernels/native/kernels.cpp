// Both kernels, written once over a vector type and compiled once per instruction set (CMakeLists.txt names it in
// INSTRUCTION_SET). The width of a vector follows from the compiler's flags; vector extensions of GCC and Clang take the
// place of intrinsics. Nothing of the standard library's templates is used here: the linker could take an instance that
// was compiled for a newer CPU and use it in code that has to run on an older one.
//
// generic and avx2 are tested; avx512 has been compiled only, its CPUs were not at hand.

#include "native.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// No more threads than have `least` of the work each: waking one up costs some 10 microseconds.
int useful(int threads, int64_t work, int64_t least) { return smaller(threads, larger(work / least, 1)); }

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

float* allocate(int64_t floats) {
    constexpr size_t LINE = 64;
    return static_cast<float*>(std::aligned_alloc(LINE, divide_up(floats * sizeof(float), LINE) * LINE));
}

// Elements as stored, and their conversion to and from fp32, rounded to the nearest even.

struct Fp32 {
    typedef float Element;
    typedef Vector Stored;
    static Vector widen(Stored x) { return x; }
    static Stored narrow(Vector x) { return x; }
};

struct Bf16 {
    typedef uint16_t Element;
    typedef Halves Stored;
    static Vector widen(Stored x) { return (Vector)(__builtin_convertvector(x, Bits) << 16); }
    static Stored narrow(Vector x) {
        Bits bits = (Bits)x;
        Bits nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        Bits is_nan = (Bits)(x != x);
        return __builtin_convertvector((is_nan & 0x7FC0) | (~is_nan & nearest_even), Halves);
    }
};

struct Fp16 {
    typedef uint16_t Element;
    typedef Halves Stored;
#if defined(__AVX512F__)
    static Vector widen(Stored x) { return _mm512_cvtph_ps((__m256i)x); }
    static Stored narrow(Vector x) { return (Stored)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
    static Vector widen(Stored x) { return _mm256_cvtph_ps((__m128i)x); }
    static Stored narrow(Vector x) { return (Stored)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#else
    static Vector choose(Bits where, Vector a, Vector b) { return (Vector)((where & (Bits)a) | (~where & (Bits)b)); }
    // By integers, so that no flush-to-zero mode touches subnormal numbers; the offsets of the exponents differ by 112.
    static Vector widen(Stored x) {
        Bits bits = __builtin_convertvector(x, Bits);
        Bits magnitude = (bits & 0x7FFF) << 13;
        Bits exponent = magnitude & 0x0F800000;
        Bits normal = magnitude + (112u << 23);
        Bits special = magnitude + (224u << 23);
        Vector subnormal = (Vector)(magnitude + (113u << 23)) - 0x1p-14f;
        Vector value = choose((Bits)(exponent == 0), subnormal, (Vector)normal);
        value = choose((Bits)(exponent == 0x0F800000), (Vector)special, value);
        return (Vector)((Bits)value | ((bits & 0x8000) << 16));
    }
    static Stored narrow(Vector x) {
        Bits bits = (Bits)x;
        Bits magnitude = bits & 0x7FFFFFFF;
        // What is rounded up to 2¹⁶ has the bits of infinity by itself.
        Bits normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        // A number below 2⁻¹⁴ has its last place at 2⁻²⁴, which is where the last place of 0.5 is in fp32.
        Bits subnormal = (Bits)((Vector)magnitude + 0.5f) - (126u << 23);
        Bits is_small = (Bits)(magnitude < (113u << 23));
        Bits is_huge = (Bits)(magnitude >= (143u << 23));
        Bits is_nan = (Bits)(magnitude > 0x7F800000);
        Bits half = (is_small & subnormal) | (~is_small & normal);
        half = (is_huge & 0x7C00) | (~is_huge & half);
        half = (is_nan & 0x7E00) | (~is_nan & half);
        return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
    }
#endif
};

// The first `count` elements of a vector; the others are 0 and stay unwritten.
template <class Kind>
Vector load(const typename Kind::Element* from, int64_t count) {
    typename Kind::Stored stored = {};
    if (count >= LANES)
        std::memcpy(&stored, from, sizeof stored);
    else
        std::memcpy(&stored, from, count * sizeof *from);
    return Kind::widen(stored);
}

template <class Kind>
void store(typename Kind::Element* to, Vector value, int64_t count) {
    typename Kind::Stored stored = Kind::narrow(value);
    if (count >= LANES)
        std::memcpy(to, &stored, sizeof stored);
    else
        std::memcpy(to, &stored, count * sizeof *to);
}

// Second moment: a symmetric product in the manner of Goto and van de Geijn. The rows of X are copied, as fp32, to panels
// of WIDTH columns, in which the same numbers serve as left and as right operand. A block of ROWS x WIDTH results stays in
// registers while DEPTH rows pass; blocks are gathered in a tile of fp32 sums, which is added to the total once per CHUNK
// rows, so that a total too large for the caches is not read and written too often.

constexpr int VECTORS = 3;
constexpr int WIDTH = VECTORS * LANES;
#if defined(__AVX512F__)
constexpr int ROWS = 8;  // 24 sums in 32 registers
#else
constexpr int ROWS = 4;  // 12 sums in 16 registers
#endif
constexpr int64_t DEPTH = 128;
constexpr int64_t CHUNK = 1024;
constexpr int64_t TILE_PANELS = 8;
constexpr int64_t TILE = TILE_PANELS * WIDTH;
constexpr int64_t PACKED_ROWS = 16;
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 25;  // about a millisecond

static_assert(WIDTH % ROWS == 0, "a panel is a whole number of left operands");

// Rows `from` to `to` of a chunk into its panels; panel p holds its columns of all rows, one row after another.
template <class Kind>
void pack(float* packed, const typename Kind::Element* x, int64_t x_stride, const int64_t* rows, int64_t from, int64_t to,
          int64_t count, int64_t d) {
    for (int64_t column = 0; column < d; column += WIDTH) {
        float* panel = packed + column * count;
        for (int64_t row = from; row < to; row++) {
            const typename Kind::Element* source = x + rows[row] * x_stride + column;
            for (int v = 0; v < VECTORS; v++) {
                int64_t left = larger(d - column - v * LANES, 0);
                store<Fp32>(panel + row * WIDTH + v * LANES, load<Kind>(source + smaller(v * LANES, d - column), left), LANES);
            }
        }
    }
}

// sums (ROWS x WIDTH) = or += aᵀb over `depth` rows; a holds ROWS columns of its panel.
inline void multiply(float* sums, int64_t stride, const float* a, const float* b, int64_t depth, bool first) {
    Vector sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; k++, a += WIDTH, b += WIDTH) {
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) std::memcpy(&right[v], b + v * LANES, sizeof(Vector));
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r] * right[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            float* to = sums + r * stride + v * LANES;
            Vector before = {};
            if (!first) std::memcpy(&before, to, sizeof before);
            before += sum[r][v];
            std::memcpy(to, &before, sizeof before);
        }
}

template <class Total>
void add_tile(Total* total, int64_t stride, const float* sums, int64_t sums_stride, int64_t row, int64_t row_end,
              int64_t column, int64_t column_end) {
    for (int64_t i = row; i < row_end; i++) {
        Total* to = total + i * stride + column;
        const float* from = sums + (i - row) * sums_stride;
        int64_t columns = smaller(column_end, i + 1) - column;
        for (int64_t j = 0; j < columns; j++) to[j] += from[j];
    }
}

// The tile at panels (i, j) of `panels` x `panels` of them.
void compute_tile(void* total, bool total_is_double, int64_t stride, float* sums, const float* packed, int64_t count,
                  int64_t d, int64_t i, int64_t j, int64_t panels) {
    const int64_t all = divide_up(d, WIDTH);
    const int64_t i_end = smaller(i + panels, all), j_end = smaller(j + panels, all);
    const int64_t sums_stride = panels * WIDTH;
    for (int64_t k = 0; k < count; k += DEPTH) {
        const int64_t depth = smaller(DEPTH, count - k);
        for (int64_t right = j; right < j_end; right++)
            for (int64_t left = larger(i, right); left < i_end; left++)
                for (int r = 0; r < WIDTH; r += ROWS)
                    multiply(sums + ((left - i) * WIDTH + r) * sums_stride + (right - j) * WIDTH, sums_stride,
                             packed + (left * count + k) * WIDTH + r, packed + (right * count + k) * WIDTH, depth, k == 0);
    }
    const int64_t row = i * WIDTH, row_end = smaller(i_end * WIDTH, d);
    const int64_t column = j * WIDTH, column_end = smaller(j_end * WIDTH, d);
    if (total_is_double)
        add_tile(static_cast<double*>(total), stride, sums, sums_stride, row, row_end, column, column_end);
    else
        add_tile(static_cast<float*>(total), stride, sums, sums_stride, row, row_end, column, column_end);
}

template <class Kind>
void add_rows(void* total, bool total_is_double, int64_t total_stride, const void* x, int64_t x_stride,
              const uint8_t* mask, int64_t n, int64_t d, int threads, float* packed, float* sums) {
    const int64_t all = divide_up(d, WIDTH);
    int64_t panels = smaller(TILE_PANELS, all);
    auto tiles = [&] {
        int64_t edge = divide_up(all, panels);
        return edge * (edge + 1) / 2;
    };
    // Enough tiles to keep every thread busy. What one block sums, and in which order, stays the same.
    while (threads > 1 && panels > 1 && tiles() < 4 * threads) panels--;

    int64_t rows[CHUNK];
    for (int64_t next = 0; next < n;) {
        int64_t count = 0;
        for (; next < n && count < CHUNK; next++)
            if (!mask || mask[next]) rows[count++] = next;
        if (!count) break;
#pragma omp parallel num_threads(useful(threads, count * d * d / 2, PRODUCTS_PER_THREAD))
        {
#pragma omp for schedule(static)
            for (int64_t from = 0; from < count; from += PACKED_ROWS)
                pack<Kind>(packed, static_cast<const typename Kind::Element*>(x), x_stride, rows, from,
                           smaller(from + PACKED_ROWS, count), count, d);
#pragma omp for schedule(dynamic) nowait
            for (int64_t tile = 0; tile < tiles(); tile++) {
                int64_t i = 0;
                while ((i + 1) * (i + 2) / 2 <= tile) i++;
                int64_t j = tile - i * (i + 1) / 2;
                compute_tile(total, total_is_double, total_stride, sums + thread_number() * TILE * TILE, packed, count, d,
                             i * panels, j * panels, panels);
            }
        }
    }
}

int second_moment(void* total, int total_is_double, int64_t total_stride, const void* x, int kind, int64_t x_stride,
                  const uint8_t* mask, int64_t n, int64_t d, int threads) {
    if (!n || !d) return 0;
    const int64_t packed_floats = divide_up(d, WIDTH) * WIDTH * smaller(n, CHUNK);
    float* packed = allocate(packed_floats + threads * TILE * TILE);
    if (!packed) return 1;
    auto add = kind == ROME_FAST_FP32 ? add_rows<Fp32> : kind == ROME_FAST_BF16 ? add_rows<Bf16> : add_rows<Fp16>;
    add(total, total_is_double, total_stride, x, x_stride, mask, n, d, threads, packed, packed + packed_floats);
    std::free(packed);
    return 0;
}

// Rank update: one pass over the weight, in strips of columns whose part of `right` stays in the L2 cache.

constexpr int UPDATED_ROWS = 4;
constexpr int64_t STRIP_FLOATS = 1 << 15;
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 18;  // about a tenth of a millisecond

template <class Kind>
inline void add(typename Kind::Element* at, Vector sum, int64_t count) {
    store<Kind>(at, load<Kind>(at, count) + sum, count);
}

// ROWS rows of one strip; right is (rank, strip).
template <class Kind, int ROWS>
void update_rows(typename Kind::Element* weight, int64_t stride, const float* left, const float* right, int64_t rank,
                 int64_t columns, int64_t strip) {
    for (int64_t j = 0; j < columns; j += WIDTH) {
        Vector sum[ROWS][VECTORS] = {};
        for (int64_t s = 0; s < rank; s++) {
            Vector factor[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) factor[v] = load<Fp32>(right + s * strip + j + v * LANES, LANES);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) sum[r][v] += left[r * rank + s] * factor[v];
        }
        // All indices of `sum` known to the compiler, or it would keep the sums in memory.
        if (columns - j >= WIDTH)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++)
                    add<Kind>(weight + r * stride + j + v * LANES, sum[r][v], LANES);
        else
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++)
                    if (int64_t count = columns - j - v * LANES; count > 0)
                        add<Kind>(weight + r * stride + j + v * LANES, sum[r][v], count);
    }
}

template <class Kind>
void update(void* weight, int64_t stride, const float* left, const float* right, int64_t d, int64_t width, int64_t rank,
            int threads, float* strips, int64_t strip) {
    typedef typename Kind::Element Element;
    const int64_t bands = smaller(divide_up(d, UPDATED_ROWS), 8 * threads);
    const int64_t across = divide_up(width, strip);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t column = 0; column < across; column++)
        for (int64_t band = 0; band < bands; band++) {
            const int64_t first = column * strip, columns = smaller(strip, width - first);
            float* part = strips + thread_number() * rank * strip;
            for (int64_t s = 0; s < rank; s++) {
                std::memcpy(part + s * strip, right + s * width + first, columns * sizeof(float));
                std::memset(part + s * strip + columns, 0, (strip - columns) * sizeof(float));
            }
            for (int64_t row = d * band / bands, end = d * (band + 1) / bands; row < end;) {
                Element* at = static_cast<Element*>(weight) + row * stride + first;
                const bool several = row + UPDATED_ROWS <= end;
                (several ? update_rows<Kind, UPDATED_ROWS> : update_rows<Kind, 1>)(at, stride, left + row * rank, part, rank,
                                                                                  columns, strip);
                row += several ? UPDATED_ROWS : 1;
            }
        }
}

int rank_update(void* weight, int kind, int64_t stride, const float* left, const float* right, int64_t d, int64_t width,
                int64_t rank, int threads) {
    if (!d || !width || !rank) return 0;
    threads = useful(threads, d * width, ELEMENTS_PER_THREAD);
    const int64_t strip = smaller(larger(STRIP_FLOATS / rank / WIDTH, 1), divide_up(width, WIDTH)) * WIDTH;
    float* strips = allocate(threads * rank * strip);
    if (!strips) return 1;
    auto add = kind == ROME_FAST_BF16 ? update<Bf16> : update<Fp16>;
    add(weight, stride, left, right, d, width, rank, threads, strips, strip);
    std::free(strips);
    return 0;
}

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const RomeFastKernels JOIN(rome_fast_, INSTRUCTION_SET){TEXT(INSTRUCTION_SET), second_moment, rank_update};
