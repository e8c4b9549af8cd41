// Owns the contract of the grad_stats stem: the arguments of its kernels and how to start them.
// Knows nothing of tensors; deepcore/ops/reference/grad_stats.py says what the operation means.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"
#include "core/segments.h"

namespace deepcore {

struct GradStatsArgs {
    DType dtype;
    const void* const* grads;  // (num_tensors,) base addresses, on the host, for CUDA too
    int64_t num_tensors;
    const int64_t* chunk_offsets;  // (num_tensors + 1,) on the host
    const Segment* segments;       // (num_segments,) from here on: on the tensors' device
    int64_t num_segments;
    double* partials;  // (chunks,) scratch: the sum of squares of each chunk
    double* squares;   // (num_segments,)
    double* summary;   // (3,): sum, 1 if anything is not finite, first such segment or -1
};

// chunks [begin, end) into partials; then, on one thread, everything else.
DEEPCORE_FOR_EACH_ISA(void grad_stats_chunks(const GradStatsArgs& args, int64_t begin, int64_t end) noexcept;
                      void grad_stats_finish(const GradStatsArgs& args) noexcept;)

// All passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_grad_stats(const GradStatsArgs& args, void* stream) noexcept;

}  // namespace deepcore
