// Owns the CPU binding of adam_: checks, starts the kernels on torch's threads.
// Knows nothing of the formula.
#include "torch/adam_args.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void adam_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& copies, const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper,
           const Tensor& steps, const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const AdamCall call = adam_call({params, grads, exp_avgs, exp_avg_sqs, copies},
                                    {segments, chunk_offsets, hyper, steps, active, grad_scale, skip}, cpu_device());
    DEEPCORE_PICK(adam_prepare)(call.args, 0, call.args.num_segments);
    const auto apply = DEEPCORE_PICK(adam_apply);
    parallel_for(call.num_chunks, 1, [&](int64_t begin, int64_t end) { apply(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
