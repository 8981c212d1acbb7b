// Both kernels in every instruction set of this CPU against loops in double: odd sizes, strides, masks, 0 and 1 rows, and
// the same bits for every number of threads. Memory between rows and masked rows hold NaN or a sentinel.

#include "native.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

int failures = 0;
std::string instruction_set;
std::mt19937 generator(5);
const double HALF_EPSILON = std::ldexp(1.0, -24);  // of fp32

void expect(bool holds, const std::string& what) {
    if (holds) return;
    failures++;
    std::printf("FAILED (%s): %s\n", instruction_set.c_str(), what.c_str());
}

float random_value() { return std::normal_distribution<float>()(generator); }

// 16-bit values by arithmetic on doubles, apart from the bit tricks that are tested.
struct Format {
    int kind, digits, smallest, largest;  // digits of the significand; exponents of the smallest and largest normal number
};
const Format BF16{ROME_FAST_BF16, 8, -126, 127}, FP16{ROME_FAST_FP16, 11, -14, 15};

double decode(const Format& format, uint16_t bits) {
    const int fraction = format.digits - 1;
    const int exponent = (bits & 0x7FFF) >> fraction, rest = bits & ((1 << fraction) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == format.largest - format.smallest + 2) return rest ? NAN : sign * INFINITY;
    if (!exponent) return sign * std::ldexp(rest, format.smallest - fraction);
    return sign * std::ldexp(rest + (1 << fraction), exponent - 1 + format.smallest - fraction);
}

// The nearest value of the format, ties to even, infinity beyond the largest.
double nearest(const Format& format, double x) {
    if (!std::isfinite(x) || x == 0) return x;
    const double unit = std::ldexp(1.0, std::max(std::ilogb(x), format.smallest) - format.digits + 1);
    const double rounded = std::nearbyint(x / unit) * unit;
    return std::abs(rounded) >= std::ldexp(1.0, format.largest + 1) ? std::copysign(INFINITY, x) : rounded;
}

void test_second_moment(int64_t n, int64_t d, int kind, bool masked, bool is_double) {
    const Format& format = kind == ROME_FAST_BF16 ? BF16 : FP16;
    const int64_t x_stride = d + 3, stride = d + 5;
    std::vector<float> wide(n * x_stride, NAN);
    std::vector<uint16_t> narrow(n * x_stride, 0x7FFF);
    std::vector<uint8_t> mask(n, 1);
    std::vector<double> wanted(d * d), size(d * d), row(d);
    for (int64_t k = 0; k < n; k++) {
        if (masked && generator() % 3 == 0) mask[k] = 0;
        for (int64_t j = 0; j < d && mask[k]; j++) {
            uint16_t bits;
            do bits = generator();
            while (!(std::abs(decode(format, bits)) < 8));
            narrow[k * x_stride + j] = bits;
            wide[k * x_stride + j] = random_value();
            row[j] = kind == ROME_FAST_FP32 ? wide[k * x_stride + j] : decode(format, bits);
        }
        for (int64_t i = 0; i < d && mask[k]; i++)
            for (int64_t j = 0; j <= i; j++) {
                wanted[i * d + j] += row[i] * row[j];
                size[i * d + j] += std::abs(row[i] * row[j]);
            }
    }
    const void* x = kind == ROME_FAST_FP32 ? static_cast<const void*>(wide.data()) : narrow.data();
    std::vector<float> first_float, total_float;
    std::vector<double> first_double, total_double;
    for (int threads : {1, 2, 3}) {
        total_float.assign(d * stride, 7);
        total_double.assign(d * stride, 7);
        void* total = is_double ? static_cast<void*>(total_double.data()) : total_float.data();
        const int status = rome_fast_second_moment(total, is_double, stride, x, kind, x_stride,
                                                   masked ? mask.data() : nullptr, n, d, threads);
        if (threads == 1) first_float = total_float, first_double = total_double;
        expect(status == 0 && first_float == total_float && first_double == total_double, "second moment: threads");
    }
    // One rounding per addition of a chain, a product's where it is not fused, one per chain, and those of the total.
    const double chain = std::min<int64_t>(n, 128) + 9.0 + (is_double ? 0 : n / 1024 + 1);
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < stride; j++) {
            const double got = is_double ? first_double[i * stride + j] : first_float[i * stride + j];
            const double exact = 7 + (j <= i ? wanted[i * d + j] : 0);
            const double bound = j <= i ? HALF_EPSILON * chain * (size[i * d + j] + (is_double ? 0 : 7)) : 0;
            if (std::abs(got - exact) <= bound + 1e-13 * std::abs(exact)) continue;
            expect(false, "second moment: n " + std::to_string(n) + ", d " + std::to_string(d) + ", kind " +
                              std::to_string(kind) + ", element " + std::to_string(i) + " " + std::to_string(j));
            return;
        }
}

void test_rank_update(int64_t d, int64_t width, int64_t rank, const Format& format) {
    const int64_t stride = width + 2;
    std::vector<float> left(d * rank), right(rank * width);
    for (float& value : left) value = random_value();
    for (float& value : right) value = random_value();
    std::vector<uint16_t> before(d * stride), weight, first;
    // Every pattern of bits, so infinities, NaN and subnormal numbers too.
    for (uint16_t& bits : before) bits = generator();
    for (int threads : {1, 2, 3}) {
        weight = before;
        const int status =
            rome_fast_rank_update(weight.data(), format.kind, stride, left.data(), right.data(), d, width, rank, threads);
        if (threads == 1) first = weight;
        expect(status == 0 && first == weight, "rank update: threads");
    }
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < stride; j++) {
            const double old = decode(format, before[i * stride + j]), got = decode(format, first[i * stride + j]);
            double sum = old, size = std::abs(old);
            for (int64_t s = 0; s < rank && j < width; s++) {
                sum += double(left[i * rank + s]) * right[s * width + j];
                size += std::abs(double(left[i * rank + s]) * right[s * width + j]);
            }
            // One rounding of a sum that carries the errors of rank + 1 roundings in fp32.
            const double error = HALF_EPSILON * (rank + 1) * size;
            const bool kept = (j >= width || !rank) && first[i * stride + j] == before[i * stride + j];
            if (kept || (std::isnan(sum) && std::isnan(got)) || got == nearest(format, sum)) continue;
            if (got >= nearest(format, sum - error) && got <= nearest(format, sum + error)) continue;
            expect(false, "rank update: d " + std::to_string(d) + ", width " + std::to_string(width) + ", rank " +
                              std::to_string(rank) + ", kind " + std::to_string(format.kind));
            return;
        }
}

// All values of a format survive, and halfway cases go to the even neighbour.
void test_rounding(const Format& format) {
    std::vector<uint16_t> weight(1 << 16);
    for (int bits = 0; bits < 1 << 16; bits++) weight[bits] = bits;
    const float zero = 0;
    const std::vector<float> nothing(weight.size(), 0.0f);
    rome_fast_rank_update(weight.data(), format.kind, weight.size(), &zero, nothing.data(), 1, weight.size(), 1, 1);
    for (int bits = 0; bits < 1 << 16; bits++) {
        const double before = decode(format, bits), after = decode(format, weight[bits]);
        expect(std::isnan(before) ? std::isnan(after) : before == after, "a value of its own format changed");
    }
    std::vector<float> sums;
    for (int bits = 0; bits < 0x7FFF; bits++) {
        const double low = decode(format, bits), high = decode(format, bits + 1);
        if (!std::isfinite(low) || std::isnan(high)) continue;
        const float middle = (low + (std::isfinite(high) ? high : std::ldexp(1.0, format.largest + 1))) / 2;
        for (float sum : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)})
            for (float sign : {1.0f, -1.0f}) sums.push_back(sign * sum);
    }
    weight.assign(sums.size(), 0);
    const float one = 1;
    rome_fast_rank_update(weight.data(), format.kind, sums.size(), &one, sums.data(), 1, sums.size(), 1, 1);
    for (size_t i = 0; i < sums.size(); i++)
        expect(decode(format, weight[i]) == nearest(format, sums[i]), "rounding of " + std::to_string(sums[i]));
}

}  // namespace

int main() {
    expect(rome_fast_native_version() == ROME_FAST_NATIVE_VERSION, "version");
    expect(rome_fast_select("nothing") == 1, "an unknown instruction set is refused");
    int tested = 0;
    for (const char* name : {"generic", "avx2", "avx512"}) {
        if (rome_fast_select(name)) {
            std::printf("%s: not on this CPU\n", name);
            continue;
        }
        instruction_set = rome_fast_instruction_set();
        expect(instruction_set == name, "selection");
        tested++;
        for (int kind : {ROME_FAST_FP32, ROME_FAST_BF16, ROME_FAST_FP16})
            for (bool masked : {false, true})
                for (bool is_double : {false, true}) {
                    test_second_moment(0, 3, kind, masked, is_double);
                    test_second_moment(1, 1, kind, masked, is_double);
                    test_second_moment(17, 7, kind, masked, is_double);
                    test_second_moment(1, 24, kind, masked, is_double);
                    test_second_moment(300, 97, kind, masked, is_double);
                }
        test_second_moment(2051, 50, ROME_FAST_FP32, true, true);
        test_second_moment(2051, 50, ROME_FAST_BF16, false, false);
        // Large enough for three threads.
        test_second_moment(1100, 451, ROME_FAST_FP32, false, true);
        for (const Format& format : {BF16, FP16}) {
            test_rank_update(0, 4, 1, format);
            test_rank_update(3, 4, 0, format);
            test_rank_update(1, 1, 1, format);
            test_rank_update(5, 9, 1, format);
            test_rank_update(9, 5, 3, format);
            test_rank_update(33, 517, 9, format);
            test_rank_update(201, 4099, 1, format);
            test_rounding(format);
        }
    }
    std::printf("%d instruction set(s) tested, %d failure(s)\n", tested, failures);
    return failures != 0;
}
