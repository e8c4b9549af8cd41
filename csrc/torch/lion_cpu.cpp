// Owns the CPU binding of lion_: checks, starts the kernels on torch's threads.
// Knows nothing of the formula.
#include "lion/lion_math.h"
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/parallel.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void lion_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& copies,
           const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
           const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const UpdateCall call = update_call({params, &grads, copies, {{"exp_avgs", exp_avgs}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Lion::kColumns, sizeof(LionScalars), cpu_device());
    DEEPCORE_PICK(lion_prepare)(call.args, 0, call.args.num_segments);
    const auto apply = DEEPCORE_PICK(lion_apply);
    parallel_chunks(call.args, call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { apply(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&lion_>(m, "lion_"); }
