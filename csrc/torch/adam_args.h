// Owns the checks of adam_'s arguments and their translation to AdamArgs, for CPU and CUDA alike.
// Knows nothing of how the kernels are started.
#pragma once

#include "adam/adam.h"
#include "torch/segment_table.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct AdamLists {
    const TensorList &params, &grads, &exp_avgs, &exp_avg_sqs, &copies;
};

struct AdamTables {
    const Tensor &segments, &chunk_offsets, &hyper, &steps, &active, &grad_scale, &skip;
};

struct AdamCall {  // the kernels' arguments, and what they point into
    std::vector<AdamTensor> tensors;
    Tensor scratch;
    AdamArgs args;
    int64_t num_chunks;
};

inline void require_state(const char* name, const TensorList& list, const TensorList& params, Device device) {
    require_list(name, list, device);
    require_companion(name, list, "params", params);
}

inline std::vector<AdamTensor> addresses(const AdamLists& lists) {
    std::vector<AdamTensor> tensors(lists.params.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].param = lists.params[i].data_ptr();
        tensors[i].grad = lists.grads[i].data_ptr();
        tensors[i].exp_avg = static_cast<float*>(lists.exp_avgs[i].data_ptr());
        tensors[i].exp_avg_sq = static_cast<float*>(lists.exp_avg_sqs[i].data_ptr());
        tensors[i].copy = lists.copies.empty() ? nullptr : lists.copies[i].data_ptr();
    }
    return tensors;
}

// No two of the five memories that one parameter's update walks may meet.
inline void require_apart(const std::vector<AdamTensor>& tensors, const AdamLists& lists) {
    const char* const names[] = {"params", "grads", "exp_avgs", "exp_avg_sqs", "copies"};
    const int used = lists.copies.empty() ? 4 : 5;
    const int64_t sizes[] = {bytes_of(float_dtype("params", lists.params)), bytes_of(float_dtype("grads", lists.grads)),
                             4, 4, 2};
    for (size_t i = 0; i < tensors.size(); ++i) {
        const AdamTensor& tensor = tensors[i];
        const void* const starts[] = {tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq, tensor.copy};
        const int64_t numel = lists.params[i].numel();
        for (int k = 1; k < used; ++k) {
            for (int j = 0; j < k; ++j) {
                if (!range_at(starts[k], numel * sizes[k]).overlaps(range_at(starts[j], numel * sizes[j]))) continue;
                fail("%s[%zu]: got memory that overlaps %s[%zu], expected memory of its own", names[k], i, names[j], i);
            }
        }
    }
}

inline void require_lists(const AdamLists& lists, Device device) {
    require_list("params", lists.params, device);
    require_state("grads", lists.grads, lists.params, device);
    require_state("exp_avgs", lists.exp_avgs, lists.params, device);
    require_state("exp_avg_sqs", lists.exp_avg_sqs, lists.params, device);
    if (!lists.copies.empty()) require_state("copies", lists.copies, lists.params, device);
    require_dtype("exp_avgs", lists.exp_avgs, ScalarType::Float);
    require_dtype("exp_avg_sqs", lists.exp_avg_sqs, ScalarType::Float);
    if (!lists.copies.empty() && lists.copies[0].scalar_type() == ScalarType::Float) {
        fail("copies: got float32, expected bfloat16 or float16");
    }
}

inline AdamCall adam_call(const AdamLists& lists, const AdamTables& tables, Device device) {
    require_lists(lists, device);
    const int64_t num_hyper_rows = tables.hyper.dim() == 2 ? tables.hyper.size(0) : 0;
    const double* hyper =
        table_of<const double>("hyper", tables.hyper, ScalarType::Double, {num_hyper_rows, kHyperColumns}, device);
    const SegmentTable table =
        segment_table(tables.segments, tables.chunk_offsets, num_hyper_rows, lists.params, device);
    const int64_t rows = table.num_rows;

    AdamCall call{
        addresses(lists), empty(rows * sizeof(AdamScalars), aoti_torch_dtype_uint8(), device), {}, table.num_chunks};
    require_apart(call.tensors, lists);
    AdamArgs& args = call.args;
    args.param_dtype = float_dtype("params", lists.params);
    args.grad_dtype = float_dtype("grads", lists.grads);
    args.copy_dtype = lists.copies.empty() ? DType::none : float_dtype("copies", lists.copies);
    args.tensors = call.tensors.data();
    args.num_tensors = static_cast<int64_t>(call.tensors.size());
    args.chunk_offsets = table.chunk_offsets;
    args.segments = table.rows;
    args.num_segments = rows;
    args.hyper = hyper;
    args.steps = table_of<float>("steps", tables.steps, ScalarType::Float, {rows}, device);
    args.active = table_of<const uint8_t>("active", tables.active, ScalarType::Byte, {rows}, device);
    args.grad_scale = table_of<const float>("grad_scale", tables.grad_scale, ScalarType::Float, {1}, device);
    args.skip = table_of<const float>("skip", tables.skip, ScalarType::Float, {1}, device);
    args.scalars = static_cast<AdamScalars*>(call.scratch.data_ptr());
    return call;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
