// Owns the CPU binding of sgd_: checks, starts the kernels on torch's threads.
// Knows nothing of the formula.
#include "sgd/sgd_math.h"
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/parallel.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void require_buffers(const UpdateArgs& args) {
    for (int64_t i = 0; i < args.num_segments && args.num_states == 0; ++i) {
        const double momentum = args.hyper[args.segments[i].hyper * Sgd::kColumns + Sgd::kMomentum];
        if (momentum != 0) {
            fail("momentum_buffers: got no tensors, expected %lld, since segments[%lld] has momentum %g",
                 (long long)args.num_tensors, (long long)i, momentum);
        }
    }
}

void sgd_(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
          const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
          const Tensor& steps, const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const UpdateCall call = update_call({params, &grads, copies, {{"momentum_buffers", momentum_buffers, true}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Sgd::kColumns, sizeof(SgdScalars), cpu_device());
    require_buffers(call.args);
    DEEPCORE_PICK(sgd_prepare)(call.args, 0, call.args.num_segments);
    const auto apply = DEEPCORE_PICK(sgd_apply);
    parallel_chunks(call.args, call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { apply(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&sgd_>(m, "sgd_"); }
