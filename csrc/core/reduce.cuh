// Owns sums and minima over the threads of a block, in one fixed order: no atomics, the same bits on every run.
// Knows nothing of what is reduced.
#pragma once

#include "core/blocks.h"

namespace deepcore {

struct Add {
    __device__ double operator()(double a, double b) const { return a + b; }
};

struct Smaller {
    __device__ double operator()(double a, double b) const { return b < a ? b : a; }
};

// Valid in thread 0. `scratch`: shared, a value per warp; it may be reused only after another barrier.
template <class Combine>
__device__ __forceinline__ double reduce_block(double value, double (&scratch)[kBlockThreads / 32],
                                               const Combine& combine) {
    constexpr unsigned kAll = 0xffffffffu;
    for (int apart = 16; apart > 0; apart /= 2) value = combine(value, __shfl_down_sync(kAll, value, apart));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kBlockThreads / 32; ++warp) value = combine(value, scratch[warp]);
    }
    return value;
}

}  // namespace deepcore
