// The public functions: calls go to the build of kernels.cpp for the best instruction set of this CPU.

#include "native.h"

#include <atomic>
#include <cstring>

#ifdef ROME_FAST_X86
#include <cpuid.h>
#endif

namespace {

#ifdef ROME_FAST_X86
// Conversions of fp16; compilers before GCC 11 cannot be asked by its name.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool has(const RomeFastKernels* kernels) {
#ifdef ROME_FAST_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (kernels == &rome_fast_avx2) return avx2;
    if (kernels == &rome_fast_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#endif
    return kernels == &rome_fast_generic;
}

// Best first.
const RomeFastKernels* const BUILDS[] = {
#ifdef ROME_FAST_X86
    &rome_fast_avx512, &rome_fast_avx2,
#endif
    &rome_fast_generic};

std::atomic<const RomeFastKernels*> selected{nullptr};

const RomeFastKernels& kernels() {
    const RomeFastKernels* current = selected;
    if (!current) {
        for (const RomeFastKernels* build : BUILDS)
            if (!current && has(build)) current = build;
        selected = current;
    }
    return *current;
}

}  // namespace

extern "C" {

int rome_fast_native_version(void) { return ROME_FAST_NATIVE_VERSION; }

const char* rome_fast_instruction_set(void) { return kernels().name; }

int rome_fast_select(const char* name) {
    for (const RomeFastKernels* build : BUILDS)
        if (!std::strcmp(build->name, name) && has(build)) {
            selected = build;
            return 0;
        }
    return 1;
}

int rome_fast_second_moment(
    void* total, int total_is_double, int64_t total_stride,
    const void* x, int kind, int64_t x_stride, const uint8_t* mask, int64_t n, int64_t d, int threads) {
    return kernels().second_moment(total, total_is_double, total_stride, x, kind, x_stride, mask, n, d, threads);
}

int rome_fast_rank_update(
    void* weight, int kind, int64_t stride,
    const float* left, const float* right, int64_t d, int64_t width, int64_t rank, int threads) {
    return kernels().rank_update(weight, kind, stride, left, right, d, width, rank, threads);
}
}
