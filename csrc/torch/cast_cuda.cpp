// Owns the CUDA binding of cast_: checks, launches on the current stream.
// Knows nothing of rounding.
#include "torch/box.h"
#include "torch/cast_args.h"
#include "torch/cuda_stream.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void cast_(const Tensor& out, const Tensor& source, const OptionalTensor& seed) {
    const Device device = cuda_device_of("out", out);
    const CastArgs args = cast_args(out, source, seed, device);
    launch_on(device, "cast_", [&](void* stream) { return launch_cast(args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("cast_", boxed<&cast_>); }
