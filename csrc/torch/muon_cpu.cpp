// Owns the CPU bindings of muon_momentum_ and muon_apply_: checks, starts the kernels on torch's threads.
// Knows nothing of the formulas.
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/muon_args.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void muon_momentum_(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
                    const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
                    const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const UpdateCall call =
        muon_momentum_call({params, &grads, kNoTensors, {{"momentum_buffers", momentum_buffers}}},
                           {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip}, cpu_device());
    DEEPCORE_PICK(muon_momentum_prepare)(call.args, 0, call.args.num_segments);
    const auto chunks = DEEPCORE_PICK(muon_momentum_chunks);
    parallel_chunks(call.args, call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(call.args, begin, end); });
}

void muon_apply_(const TensorList& params, const TensorList& grads, const TensorList& copies, const Tensor& segments,
                 const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
                 const Tensor& ratios, const Tensor& skip) {
    const MuonApplyCall call =
        muon_apply_call({params, &grads, copies, {}}, {segments, chunk_offsets, hyper, steps, active, nullptr, skip},
                        ratios, cpu_device());
    DEEPCORE_PICK(muon_apply_prepare)(call.args, 0, call.args.num_segments);
    const auto chunks = DEEPCORE_PICK(muon_apply_chunks);
    parallel_chunks(call.args, call.call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) {
    serve<&muon_momentum_>(m, "muon_momentum_");
    serve<&muon_apply_>(m, "muon_apply_");
}
