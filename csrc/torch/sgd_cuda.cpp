// Owns the CUDA binding of sgd_: checks, launches on the current stream.
// Knows nothing of the formula.
#include "sgd/sgd_math.h"
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void sgd_(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
          const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
          const Tensor& steps, const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const UpdateCall call = update_call({params, &grads, copies, {{"momentum_buffers", momentum_buffers, true}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Sgd::kColumns, sizeof(SgdScalars), device);
    launch_on(device, "sgd_", [&](void* stream) { return launch_sgd(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("sgd_", boxed<&sgd_>); }
