// Owns the CUDA bindings of adam_ and adam_stochastic_: checks, launches on the current stream.
// Knows nothing of the formula.
#include "adam/adam_math.h"
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void adam_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& max_exp_avg_sqs, const TensorList& copies, const Tensor& segments,
           const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
           const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const std::vector<NamedList> states = {
        {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs, true}};
    const UpdateCall call = update_call({params, &grads, copies, states, true},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Adam::kColumns, sizeof(AdamScalars), device);
    launch_on(device, "adam_", [&](void* stream) { return launch_adam(call.args, stream); });
}

void adam_stochastic_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const Tensor& segments,
                      const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
                      const Tensor& grad_scale, const Tensor& skip, const Tensor& origins, const Tensor& seed) {
    const Device device = cuda_device_of("segments", segments);
    const std::vector<NamedList> states = {
        {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs, true}};
    const UpdateCall call =
        update_call({params, &grads, kNoTensors, states, true},
                    {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip, &origins, &seed}, Adam::kColumns,
                    sizeof(StochasticAdamScalars), device);
    launch_on(device, "adam_stochastic_", [&](void* stream) { return launch_adam_stochastic(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) {
    m.impl("adam_", boxed<&adam_>);
    m.impl("adam_stochastic_", boxed<&adam_stochastic_>);
}
