// Owns the CUDA binding of lion_: checks, launches on the current stream.
// Knows nothing of the formula.
#include "lion/lion_math.h"
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void lion_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& copies,
           const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
           const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const UpdateCall call = update_call({params, &grads, copies, {{"exp_avgs", exp_avgs}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Lion::kColumns, sizeof(LionScalars), device);
    launch_on(device, "lion_", [&](void* stream) { return launch_lion(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("lion_", boxed<&lion_>); }
