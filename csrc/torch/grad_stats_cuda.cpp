// Owns the CUDA binding of grad_stats: checks, launches on the current stream.
// Knows nothing of the order of the sums.
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/grad_stats_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

std::tuple<Tensor, Tensor> grad_stats(const TensorList& grads, const Tensor& segments, const Tensor& chunk_offsets) {
    const Device device = cuda_device_of("segments", segments);
    GradStatsCall call = grad_stats_call(grads, segments, chunk_offsets, device);
    launch_on(device, "grad_stats", [&](void* stream) { return launch_grad_stats(call.args, stream); });
    return {std::move(call.squares), std::move(call.summary)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("grad_stats", boxed<&grad_stats>); }
