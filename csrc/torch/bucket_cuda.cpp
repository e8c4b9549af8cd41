// Owns the CUDA binding of bucket_sum_: checks, launches on the current stream.
// Knows nothing of how parts are summed.
#include "torch/bucket_args.h"
#include "torch/cuda_stream.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void bucket_sum_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor) {
    const Device device = cuda_device_of("out", out);
    const BucketArgs args = bucket_args(out, parts, accumulate, divisor, device);
    launch_on(device, "bucket_sum_", [&](void* stream) { return launch_bucket(args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("bucket_sum_", TORCH_BOX(&bucket_sum_)); }
