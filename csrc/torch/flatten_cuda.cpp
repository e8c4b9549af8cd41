// Owns the CUDA bindings of flatten_ and unflatten_: checks, launches on the current stream.
// Knows nothing of how elements are copied.
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/flatten_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void start(const char* op, const Tensor& flat, const TensorList& tensors, const Tensor& starts, Direction direction) {
    const Device device = cuda_device_of("flat", flat);
    const FlattenCall call = flatten_call(flat, tensors, starts, direction, device);
    launch_on(device, op, [&](void* stream) { return launch_flatten(call.args, stream); });
}

void flatten_(const Tensor& flat, const TensorList& tensors, const Tensor& starts) {
    start("flatten_", flat, tensors, starts, Direction::flatten);
}

void unflatten_(const TensorList& tensors, const Tensor& flat, const Tensor& starts) {
    start("unflatten_", flat, tensors, starts, Direction::unflatten);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) {
    m.impl("flatten_", boxed<&flatten_>);
    m.impl("unflatten_", boxed<&unflatten_>);
}
