// Owns the CPU binding of the bucket stem: checks, starts the kernel on torch's threads.
// Knows nothing of how parts are summed.
#include "torch/bucket_args.h"
#include "torch/direct.h"
#include "torch/grad_stats_args.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

constexpr int64_t kBucketGrain = 32768;             // elements of all parts together that are worth a thread
constexpr int64_t kBucketStreamingNumel = 1 << 22;  // beyond this the caches would only hold what nobody reads soon

BucketArgs cpu_args(const Tensor& out, const Tensor& parts, bool accumulate, double divisor) {
    BucketArgs args = bucket_args(out, parts, accumulate, divisor, cpu_device());
    args.streaming = !accumulate && args.numel >= kBucketStreamingNumel;  // what is read first is in the caches anyway
    return args;
}

void bucket_sum_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor) {
    const BucketArgs args = cpu_args(out, parts, accumulate, divisor);
    const auto sum = DEEPCORE_PICK(bucket_range);
    parallel_for(args.numel, kBucketGrain / args.num_parts + 1,
                 [&](int64_t begin, int64_t end) { sum(args, begin, end); });
}

Tensor bucket_sum_squares_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor,
                           const Tensor& segments, const Tensor& chunk_offsets) {
    const BucketArgs args = cpu_args(out, parts, accumulate, divisor);
    GradStatsCall stats = grad_stats_call(out, segments, chunk_offsets, cpu_device());
    const auto chunks = DEEPCORE_PICK(bucket_chunks);
    parallel_chunks(stats.args, stats.num_chunks, 2 * kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(args, stats.args, begin, end); });
    DEEPCORE_PICK(grad_stats_finish)(stats.args);
    return std::move(stats.squares);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) {
    serve<&bucket_sum_>(m, "bucket_sum_");
    serve<&bucket_sum_squares_>(m, "bucket_sum_squares_");
}
