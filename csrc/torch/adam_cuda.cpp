// Owns the CUDA binding of adam_: checks, launches on the current stream.
// Knows nothing of the formula.
#include "torch/adam_args.h"
#include "torch/cuda_stream.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void adam_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
           const Tensor& steps, const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const AdamCall call = adam_call({params, grads, exp_avgs, exp_avg_sqs, copies},
                                    {segments, chunk_offsets, hyper, steps, active, grad_scale, skip}, device);
    launch_on(device, "adam_", [&](void* stream) { return launch_adam(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
