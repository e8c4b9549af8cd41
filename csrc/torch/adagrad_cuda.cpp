// Owns the CUDA binding of adagrad_: checks, launches on the current stream.
// Knows nothing of the formula.
#include "adagrad/adagrad_math.h"
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void adagrad_(const TensorList& params, const TensorList& grads, const TensorList& sums, const TensorList& copies,
              const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
              const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const Device device = cuda_device_of("segments", segments);
    const UpdateCall call = update_call({params, &grads, copies, {{"sums", sums}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Adagrad::kColumns, sizeof(AdagradScalars), device);
    launch_on(device, "adagrad_", [&](void* stream) { return launch_adagrad(call.args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("adagrad_", boxed<&adagrad_>); }
