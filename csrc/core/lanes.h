// Owns the order in which the squares of a chunk are summed on a CPU: the same for any number of threads and any vector
// width.
// Knows nothing of vectors. The square of a widened fp32, bf16 or fp16 is exact in fp64: only the sums round.
#pragma once

#include "core/host_device.h"

namespace deepcore {

// Element i of a chunk is added to lane i % kLanes; the lanes are then folded in halves.
constexpr int kLanes = 32;

DEEPCORE_FN double fold_lanes(double* lanes) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

}  // namespace deepcore
