// Owns the CPU bindings of lamb_moments_ and lamb_apply_: checks, starts the kernels on torch's threads.
// Knows nothing of the formulas.
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/lamb_args.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void lamb_moments_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const Tensor& segments, const Tensor& chunk_offsets,
                   const Tensor& hyper, const Tensor& steps, const Tensor& active, const Tensor& grad_scale,
                   const Tensor& skip, const Tensor& squares) {
    const LambMomentsCall call =
        lamb_moments_call({params, &grads, kNoTensors, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}},
                          {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip}, squares, cpu_device());
    DEEPCORE_PICK(lamb_moments_prepare)(call.args, 0, call.args.num_segments);
    const auto chunks = DEEPCORE_PICK(lamb_moments_chunks);
    parallel_chunks(call.args, call.call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(call.args, begin, end); });
    DEEPCORE_PICK(lamb_moments_finish)(call.args);
}

void lamb_apply_(const TensorList& params, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                 const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
                 const Tensor& steps, const Tensor& active, const Tensor& squares, const Tensor& skip) {
    const LambApplyCall call =
        lamb_apply_call({params, nullptr, copies, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}},
                        {segments, chunk_offsets, hyper, steps, active, nullptr, skip}, squares, cpu_device());
    DEEPCORE_PICK(lamb_apply_prepare)(call.args, 0, call.args.num_segments);
    const auto chunks = DEEPCORE_PICK(lamb_apply_chunks);
    parallel_chunks(call.args, call.call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) {
    serve<&lamb_moments_>(m, "lamb_moments_");
    serve<&lamb_apply_>(m, "lamb_apply_");
}
