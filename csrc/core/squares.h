// Owns sums of squares over a run of elements on a CPU; compiled once per instruction set.
// Knows nothing of chunks beyond their lanes, see core/lanes.h.
#pragma once

#include "core/lanes.h"
#include "core/simd.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

// Adds the squares of elements whose first one belongs to lane 0. ahead: bytes to prefetch before they are needed, 0
// for what is in the caches; they are never read, so beyond the end is harmless.
template <int64_t ahead, class T>
void add_squares(const T* x, int64_t numel, double (&lanes)[kLanes]) {
    constexpr int kStep = sizeof(dvec) / sizeof(double), kSums = kLanes / kStep;
    dvec sums[kSums];
    DEEPCORE_UNROLL
    for (int k = 0; k < kSums; ++k) load(lanes + k * kStep, sums[k]);
    int64_t i = 0;
    for (; i + kLanes <= numel; i += kLanes) {
        for (int64_t line = 0; ahead > 0 && line < kLanes * static_cast<int64_t>(sizeof(T)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(x + i) + ahead + line, 0, 2);
        add_squares_of(x + i, sums);
    }
    DEEPCORE_UNROLL
    for (int k = 0; k < kSums; ++k) store(lanes + k * kStep, sums[k]);
    for (int k = 0; i < numel; ++i, ++k) {
        double value;
        load(x + i, value);
        lanes[k] += value * value;
    }
}

}  // namespace

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
