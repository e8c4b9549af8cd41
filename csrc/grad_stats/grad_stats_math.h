// Owns the order in which squares are summed: the same for any number of threads and any vector width.
// Knows nothing of tensors. The square of a widened fp32, bf16 or fp16 is exact in fp64: only the sums round.
#pragma once

#include "grad_stats/grad_stats.h"

namespace deepcore {

// Element i of a chunk is added to lane i % kLanes; the lanes are then folded in halves.
constexpr int kLanes = 32;

DEEPCORE_FN double fold_lanes(double* lanes) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

DEEPCORE_FN bool is_finite(double x) { return x - x == 0; }

struct Summary {  // fp64 (3,) when stored
    double sum, any_bad, first_bad;
};

DEEPCORE_FN Summary empty_summary() { return {0, 0, -1}; }

// A finite element cannot overflow its segment's sum: squares of fp32 stay below 2^256.
DEEPCORE_FN void add_segment(Summary& summary, double square, int64_t index) {
    summary.sum += square;
    if (!is_finite(square) && summary.any_bad == 0) {
        summary.any_bad = 1;
        summary.first_bad = static_cast<double>(index);
    }
}

}  // namespace deepcore
