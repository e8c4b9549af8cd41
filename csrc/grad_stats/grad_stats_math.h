// Owns the summary of the segments' sums. The order within a chunk is core/lanes.h's.
// Knows nothing of tensors.
#pragma once

#include "core/lanes.h"
#include "grad_stats/grad_stats.h"

namespace deepcore {

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
