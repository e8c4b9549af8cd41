// Owns the CPU binding of bucket_sum_: checks, starts the kernel on torch's threads.
// Knows nothing of how parts are summed.
#include "torch/bucket_args.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

constexpr int64_t kBucketGrain = 32768;             // elements of all parts together that are worth a thread
constexpr int64_t kBucketStreamingNumel = 1 << 22;  // beyond this the caches would only hold what nobody reads soon

void bucket_sum_(const Tensor& out, const Tensor& parts, bool accumulate, double divisor) {
    BucketArgs args = bucket_args(out, parts, accumulate, divisor, cpu_device());
    args.streaming = !accumulate && args.numel >= kBucketStreamingNumel;  // what is read first is in the caches anyway
    const auto sum = DEEPCORE_PICK(bucket_range);
    parallel_for(args.numel, kBucketGrain / args.num_parts + 1,
                 [&](int64_t begin, int64_t end) { sum(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { m.impl("bucket_sum_", TORCH_BOX(&bucket_sum_)); }
