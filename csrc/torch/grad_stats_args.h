// Owns the checks of grad_stats' arguments and their translation to GradStatsArgs, for CPU and CUDA alike.
// Knows nothing of how the kernels are started.
#pragma once

#include "grad_stats/grad_stats.h"
#include "torch/segment_table.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct GradStatsCall {  // the kernels' arguments, and what they point into
    std::vector<const void*> grads;
    Scratch partials;
    Tensor squares, summary;
    GradStatsArgs args;
    int64_t num_chunks;
};

inline GradStatsCall grad_stats_call(TensorSpan list, const Tensor& segments, const Tensor& chunk_offsets,
                                     Device device) {
    const CheckedList grads = checked_list("grads", list, device);
    const DType dtype = float_dtype(grads);
    const SegmentTable table = segment_table(segments, chunk_offsets, -1, grads, device);
    const int32_t fp64 = aoti_torch_dtype_float64();
    GradStatsCall call{{},
                       Scratch(table.num_chunks * sizeof(double), device),
                       empty(table.num_rows, fp64, device),
                       empty(3, fp64, device),
                       {},
                       table.num_chunks};
    call.grads.reserve(grads.size());
    for (const Dense& grad : grads.dense) call.grads.push_back(grad.data);

    GradStatsArgs& args = call.args;
    args.dtype = dtype;
    args.grads = call.grads.data();
    args.num_tensors = static_cast<int64_t>(grads.size());
    args.chunk_offsets = table.chunk_offsets;
    args.segments = table.rows;
    args.num_segments = table.num_rows;
    args.partials = static_cast<double*>(call.partials.memory());
    args.squares = static_cast<double*>(call.squares.data_ptr());
    args.summary = static_cast<double*>(call.summary.data_ptr());
    return call;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
