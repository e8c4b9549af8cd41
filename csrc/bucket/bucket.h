// Owns the contract of the bucket stem: the arguments of its kernels and how to start them.
// Knows nothing of tensors; deepcore/ops/reference/bucket.py says what the operation means.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"
#include "grad_stats/grad_stats.h"

namespace deepcore {

struct BucketArgs {
    DType out_dtype, part_dtype;
    void* out;          // (numel,)
    const void* parts;  // (num_parts, numel); may be `out` itself where there is one part of the same type
    int64_t numel, num_parts;
    float by;     // the sum is divided by this, or else multiplied with it
    bool divide;  // see set_divisor
    bool accumulate;
    bool streaming;  // CPU: write around the caches
};

// bucket_range: elements [begin, end) of out. bucket_chunks: chunks [begin, end) of a table over out, the one tensor of
// `stats`, and their sums of squares, in the order of grad_stats_chunks, while they are in the caches.
DEEPCORE_FOR_EACH_ISA(void bucket_range(const BucketArgs& args, int64_t begin, int64_t end) noexcept;
                      void bucket_chunks(const BucketArgs& args, const GradStatsArgs& stats, int64_t begin,
                                         int64_t end) noexcept;)

// On a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_bucket(const BucketArgs& args, void* stream) noexcept;

}  // namespace deepcore
