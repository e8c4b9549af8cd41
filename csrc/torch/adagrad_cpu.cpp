// Owns the CPU binding of adagrad_: checks, starts the kernels on torch's threads.
// Knows nothing of the formula.
#include "adagrad/adagrad_math.h"
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/parallel.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void adagrad_(const TensorList& params, const TensorList& grads, const TensorList& sums, const TensorList& copies,
              const Tensor& segments, const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps,
              const Tensor& active, const Tensor& grad_scale, const Tensor& skip) {
    const UpdateCall call = update_call({params, &grads, copies, {{"sums", sums}}},
                                        {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip},
                                        Adagrad::kColumns, sizeof(AdagradScalars), cpu_device());
    DEEPCORE_PICK(adagrad_prepare)(call.args, 0, call.args.num_segments);
    const auto apply = DEEPCORE_PICK(adagrad_apply);
    parallel_chunks(call.args, call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { apply(call.args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&adagrad_>(m, "adagrad_"); }
