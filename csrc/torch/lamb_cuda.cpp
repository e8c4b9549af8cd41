// Owns the CUDA bindings of lamb_moments_ and lamb_apply_: checks, launches on the current stream.
// Knows nothing of the formulas.
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/lamb_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void lamb_moments_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const Tensor& segments, const Tensor& chunk_offsets,
                   const Tensor& hyper, const Tensor& steps, const Tensor& active, const Tensor& grad_scale,
                   const Tensor& skip, const Tensor& squares) {
    const Device device = cuda_device_of("segments", segments);
    const LambMomentsCall call =
        lamb_moments_call({params, &grads, kNoTensors, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}},
                          {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip}, squares, device);
    launch_on(device, "lamb_moments_", [&](void* stream) { return launch_lamb_moments(call.args, stream); });
}

void lamb_apply_(const TensorList& params, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                 const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
                 const Tensor& steps, const Tensor& active, const Tensor& squares, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const LambApplyCall call =
        lamb_apply_call({params, nullptr, copies, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}},
                        {segments, chunk_offsets, hyper, steps, active, nullptr, skip}, squares, device);
    launch_on(device, "lamb_apply_", [&](void* stream) { return launch_lamb_apply(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) {
    m.impl("lamb_moments_", boxed<&lamb_moments_>);
    m.impl("lamb_apply_", boxed<&lamb_apply_>);
}
