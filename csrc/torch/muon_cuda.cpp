// Owns the CUDA bindings of muon_momentum_ and muon_apply_: checks, launches on the current stream.
// Knows nothing of the formulas.
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/muon_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void muon_momentum_(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
                    const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
                    const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const UpdateCall call =
        muon_momentum_call({params, &grads, kNoTensors, {{"momentum_buffers", momentum_buffers}}},
                           {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip}, device);
    launch_on(device, "muon_momentum_", [&](void* stream) { return launch_muon_momentum(call.args, stream); });
}

void muon_apply_(const TensorList& params, const TensorList& grads, const TensorList& copies, const Tensor& segments,
                 const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
                 const Tensor& ratios, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const MuonApplyCall call = muon_apply_call(
        {params, &grads, copies, {}}, {segments, chunk_offsets, hyper, steps, active, nullptr, skip}, ratios, device);
    launch_on(device, "muon_apply_", [&](void* stream) { return launch_muon_apply(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) {
    m.impl("muon_momentum_", boxed<&muon_momentum_>);
    m.impl("muon_apply_", boxed<&muon_apply_>);
}
