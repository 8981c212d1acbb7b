// Kernels for CPUs behind a flat C interface: pointers, sizes and strides, no torch headers, so that one build serves
// every version of torch and Python. Arguments are taken as valid; the checks live in ops.py and __init__.py.
#pragma once

#include <cstdint>

// Changes with any signature below; the loader refuses a library of another version.
#define ROME_FAST_NATIVE_VERSION 1

#pragma GCC visibility push(default)
extern "C" {

// How the elements of x and weight are stored.
enum RomeFastKind { ROME_FAST_FP32 = 0, ROME_FAST_BF16 = 1, ROME_FAST_FP16 = 2 };

int rome_fast_native_version(void);

// The instruction set in use: the best one that this CPU has, until another is selected.
const char* rome_fast_instruction_set(void);

// Take another one, "generic", "avx2" or "avx512", for tests and benchmarks. Returns 0, or 1 if there is none such here.
int rome_fast_select(const char* name);

// total += XᵀX over the rows whose mask byte is not 0 (all rows for a null mask); only elements on and below the
// diagonal are touched. total is (d, d) float or double, x (n, d); both have unit stride along a row. Products are summed
// in fp32 over at most 1,024 rows, in chains of at most 128, before they are added to total. The result does not depend on
// the number of threads. Returns 0, or 1 for want of memory, with total unchanged.
int rome_fast_second_moment(
    void* total, int total_is_double, int64_t total_stride,
    const void* x, int kind, int64_t x_stride, const uint8_t* mask, int64_t n, int64_t d, int threads);

// weight += left @ right, summed in fp32 and rounded to the kind of weight (not fp32) once. weight is (d, width) with unit
// stride along a row, left (d, rank) and right (rank, width) are contiguous fp32. Returns 0, or 1 for want of memory, with weight
// unchanged.
int rome_fast_rank_update(
    void* weight, int kind, int64_t stride,
    const float* left, const float* right, int64_t d, int64_t width, int64_t rank, int threads);
}
#pragma GCC visibility pop

// One build of kernels.cpp per instruction set.
struct RomeFastKernels {
    const char* name;
    decltype(&rome_fast_second_moment) second_moment;
    decltype(&rome_fast_rank_update) rank_update;
};

extern const RomeFastKernels rome_fast_generic, rome_fast_avx2, rome_fast_avx512;
