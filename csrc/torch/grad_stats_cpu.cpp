// Owns the CPU binding of grad_stats: checks, starts the kernels on torch's threads.
// Knows nothing of the order of the sums.
#include "torch/direct.h"
#include "torch/grad_stats_args.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

std::tuple<Tensor, Tensor> grad_stats(const TensorList& grads, const Tensor& segments, const Tensor& chunk_offsets) {
    GradStatsCall call = grad_stats_call(grads, segments, chunk_offsets, cpu_device());
    const auto chunks = DEEPCORE_PICK(grad_stats_chunks);
    parallel_chunks(call.args, call.num_chunks, 2 * kChunkNumel,
                    [&](int64_t begin, int64_t end) { chunks(call.args, begin, end); });
    DEEPCORE_PICK(grad_stats_finish)(call.args);
    return {std::move(call.squares), std::move(call.summary)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&grad_stats>(m, "grad_stats"); }
