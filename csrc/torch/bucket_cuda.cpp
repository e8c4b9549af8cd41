// Owns the CUDA binding of the bucket stem: checks, launches on the current stream.
// Knows nothing of how parts are summed.
#include "torch/box.h"
#include "torch/bucket_args.h"
#include "torch/cuda_stream.h"
#include "torch/grad_stats_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void bucket_sum_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor) {
    const Device device = cuda_device_of("out", out);
    const BucketArgs args = bucket_args(out, parts, accumulate, divisor, device);
    launch_on(device, "bucket_sum_", [&](void* stream) { return launch_bucket(args, stream); });
}

// The sums are read while they are in the second cache.
Tensor bucket_sum_squares_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor,
                           const Tensor& segments, const Tensor& chunk_offsets) {
    const Device device = cuda_device_of("out", out);
    const BucketArgs args = bucket_args(out, parts, accumulate, divisor, device);
    GradStatsCall stats = grad_stats_call(out, segments, chunk_offsets, device);
    launch_on(device, "bucket_sum_squares_", [&](void* stream) {
        const char* text = launch_bucket(args, stream);
        return text ? text : launch_grad_stats(stats.args, stream);
    });
    return std::move(stats.squares);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) {
    m.impl("bucket_sum_", boxed<&bucket_sum_>);
    m.impl("bucket_sum_squares_", boxed<&bucket_sum_squares_>);
}
