// Owns the checks of what elementwise optimizer ops are given, and their translation to UpdateArgs, for CPU and CUDA
// alike. Knows nothing of any one formula, nor of how the kernels are started.
#pragma once

#include "core/update.h"
#include "torch/segment_table.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct NamedList {
    const char* name;
    const TensorList& list;
    bool optional = false;  // may be empty; then those after it are, too
};

const TensorList kNoCopies;

struct UpdateLists {
    const TensorList& params;
    const TensorList* grads;  // null where the op has none
    const TensorList& copies;
    std::vector<NamedList> states;  // at most kMaxStates
    bool narrow_states = false;     // they may be bf16, else all are fp32

    int num_states() const {  // that were given; all of them where there is nothing to update
        size_t count = 0;
        while (count < states.size() && (params.empty() || !states[count].list.empty())) ++count;
        return static_cast<int>(count);
    }
};

struct UpdateTables {
    const Tensor &segments, &chunk_offsets, &hyper, &steps, &active;
    const Tensor* grad_scale;  // null where there are no gradients
    const Tensor& skip;
    const Tensor* origins = nullptr;  // where parameters are rounded at random
    const Tensor* seed = nullptr;
};

struct UpdateCall {  // the kernels' arguments, and what they point into
    std::vector<UpdateTensor> tensors;
    Scratch scratch;
    UpdateArgs args;
    int64_t num_chunks;
};

// All states have one dtype.
inline void require_state_dtype(const UpdateLists& lists, const NamedList& state) {
    const NamedList& first = lists.states[0];
    const bool narrow = lists.narrow_states && !first.list.empty() && is_of(first.list[0], ScalarType::BFloat16);
    require_dtype(state.name, state.list, narrow ? ScalarType::BFloat16 : ScalarType::Float);
}

// Whether each segment brings its gradient as a tensor. Where that and one per parameter have the same sizes, they mean
// the same: then a segment is all of its tensor.
inline bool has_loose_grads(const UpdateLists& lists, int64_t rows) {
    if (lists.grads == nullptr || lists.grads->size() != static_cast<size_t>(rows)) return false;
    if (lists.grads->size() != lists.params.size()) return true;
    for (size_t i = 0; i < lists.params.size(); ++i) {
        if ((*lists.grads)[i].numel() != lists.params[i].numel()) return true;
    }
    return false;
}

inline void require_update_lists(const UpdateLists& lists, bool loose, Device device) {
    require_list("params", lists.params, device);
    if (lists.grads != nullptr) require_list("grads", *lists.grads, device);
    if (lists.grads != nullptr && !loose) require_companion("grads", *lists.grads, "params", lists.params);
    if (loose && !device.is_cpu()) {
        fail("grads: got a tensor for each of %zu segments, expected %zu as in params: only a CPU takes them apart",
             lists.grads->size(), lists.params.size());
    }
    for (const NamedList& state : lists.states) {
        if (state.optional && state.list.empty()) continue;
        require_list(state.name, state.list, device);
        require_companion(state.name, state.list, "params", lists.params);
        require_state_dtype(lists, state);
    }
    if (lists.copies.empty()) return;
    require_list("copies", lists.copies, device);
    require_companion("copies", lists.copies, "params", lists.params);
    if (is_of(lists.copies[0], ScalarType::Float)) fail("copies: got float32, expected bfloat16 or float16");
}

inline std::vector<UpdateTensor> update_tensors(const UpdateLists& lists, bool loose) {
    std::vector<UpdateTensor> tensors(lists.params.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i] = {lists.params[i].data_ptr(), nullptr, {}, nullptr};
        if (lists.grads != nullptr && !loose) tensors[i].grad = (*lists.grads)[i].data_ptr();
        if (!lists.copies.empty()) tensors[i].copy = lists.copies[i].data_ptr();
        for (int k = 0; k < lists.num_states(); ++k) tensors[i].states[k] = lists.states[k].list[i].data_ptr();
    }
    return tensors;
}

struct Walked {  // one of the memories that a parameter's update walks, and the bytes of an element
    const char* name;
    const void* memory;
    int64_t size;
};

// No two of the memories that one parameter's update walks may meet.
inline void require_apart(const UpdateLists& lists, const std::vector<UpdateTensor>& tensors, const UpdateArgs& args) {
    for (size_t i = 0; i < tensors.size(); ++i) {
        const UpdateTensor& tensor = tensors[i];
        Walked walked[3 + kMaxStates] = {{"params", tensor.param, bytes_of(args.param_dtype)},
                                         {"grads", tensor.grad, bytes_of(args.grad_dtype)},
                                         {"copies", tensor.copy, bytes_of(args.copy_dtype)}};
        int count = 3;
        for (int k = 0; k < lists.num_states(); ++k)
            walked[count++] = {lists.states[k].name, tensor.states[k], bytes_of(args.state_dtype)};
        const int64_t numel = lists.params[i].numel();
        for (int a = 0; a < count; ++a) {
            for (int b = 0; b < a; ++b) {
                if (walked[a].memory == nullptr || walked[b].memory == nullptr) continue;
                const Range memory = range_at(walked[a].memory, numel * walked[a].size);
                if (!memory.overlaps(range_at(walked[b].memory, numel * walked[b].size))) continue;
                fail("%s[%zu]: got memory that overlaps %s[%zu], expected memory of its own", walked[a].name, i,
                     walked[b].name, i);
            }
        }
    }
}

// The addresses for each segment, whose gradient may lie anywhere but in what the update writes.
inline std::vector<UpdateTensor> tensors_by_segment(const UpdateLists& lists, const std::vector<UpdateTensor>& tensors,
                                                    const SegmentTable& table, const UpdateArgs& args) {
    std::vector<Range> written;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const int64_t numel = lists.params[i].numel();
        written.push_back(range_at(tensors[i].param, numel * bytes_of(args.param_dtype)));
        if (tensors[i].copy != nullptr) written.push_back(range_at(tensors[i].copy, numel * bytes_of(args.copy_dtype)));
        for (int k = 0; k < lists.num_states(); ++k)
            written.push_back(range_at(tensors[i].states[k], numel * bytes_of(args.state_dtype)));
    }
    std::vector<UpdateTensor> found(table.num_rows);
    const int64_t size = bytes_of(args.grad_dtype);
    for (int64_t row = 0; row < table.num_rows; ++row) {
        const Segment& segment = table.rows[row];
        const Tensor& grad = (*lists.grads)[row];
        if (grad.numel() != segment.numel) {
            fail("grads[%lld]: got %lld elements, expected %lld as in segments[%lld]", (long long)row,
                 (long long)grad.numel(), (long long)segment.numel, (long long)row);
        }
        const Range memory = range_at(grad.data_ptr(), segment.numel * size);
        for (const Range& range : written) {
            if (!memory.overlaps(range)) continue;
            fail("grads[%lld]: got memory that overlaps what the update writes, expected memory of its own",
                 (long long)row);
        }
        found[row] = tensors[segment.tensor];
        found[row].grad = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(memory.begin) -
                                                        static_cast<uintptr_t>(segment.begin * size));
    }
    return found;
}

// Where parameters are rounded at random: from what.
inline void set_origins(const UpdateLists& lists, const UpdateTables& tables, Device device, UpdateArgs& args) {
    if (!lists.params.empty() && args.param_dtype != DType::bf16) {
        fail("params: got %s, expected bfloat16, the one that is rounded at random",
             dtype_name(lists.params[0].scalar_type()));
    }
    const int64_t rows = args.num_segments;
    args.origins = table_of<const int64_t>("origins", *tables.origins, ScalarType::Long, {rows, 2}, device);
    args.seed = table_of<const int64_t>("seed", *tables.seed, ScalarType::Long, {1}, device);
    for (int64_t i = 0; device.is_cpu() && i < rows; ++i) {
        const int64_t param = args.origins[2 * i], first = args.origins[2 * i + 1];
        if (param >= 0 && param >> 32 == 0 && first >= 0 && first >> 62 == 0) continue;
        fail("origins[%lld]: got parameter %lld and element %lld, expected numbers below 2^32 and 2^62", (long long)i,
             (long long)param, (long long)first);
    }
}

// columns: of a hyperparameter row; scalars_size: bytes of what a segment's scalars take.
inline UpdateCall update_call(const UpdateLists& lists, const UpdateTables& tables, int64_t columns,
                              int64_t scalars_size, Device device) {
    const bool loose = has_loose_grads(lists, tables.segments.dim() == 2 ? tables.segments.size(0) : 0);
    require_update_lists(lists, loose, device);
    const int64_t num_hyper_rows = tables.hyper.dim() == 2 ? tables.hyper.size(0) : 0;
    const double* hyper =
        table_of<const double>("hyper", tables.hyper, ScalarType::Double, {num_hyper_rows, columns}, device);
    const SegmentTable table =
        segment_table(tables.segments, tables.chunk_offsets, num_hyper_rows, lists.params, device);
    const int64_t rows = table.num_rows;

    UpdateCall call{update_tensors(lists, loose), Scratch(rows * scalars_size, device), {}, table.num_chunks};
    UpdateArgs& args = call.args;
    args.param_dtype = float_dtype("params", lists.params);
    args.grad_dtype = lists.grads == nullptr ? DType::none : float_dtype("grads", *lists.grads);
    args.state_dtype = lists.states.empty() ? DType::f32 : float_dtype(lists.states[0].name, lists.states[0].list);
    args.copy_dtype = lists.copies.empty() ? DType::none : float_dtype("copies", lists.copies);
    require_apart(lists, call.tensors, args);
    args.num_tensors = static_cast<int64_t>(call.tensors.size());
    args.by_segment = loose;
    if (loose) call.tensors = tensors_by_segment(lists, call.tensors, table, args);
    args.tensors = call.tensors.data();
    args.chunk_offsets = table.chunk_offsets;
    args.segments = table.rows;
    args.num_segments = rows;
    args.hyper = hyper;
    args.steps = table_of<float>("steps", tables.steps, ScalarType::Float, {rows}, device);
    args.active = table_of<const uint8_t>("active", tables.active, ScalarType::Byte, {rows}, device);
    if (tables.grad_scale != nullptr) {
        args.grad_scale = table_of<const float>("grad_scale", *tables.grad_scale, ScalarType::Float, {1}, device);
    }
    args.skip = table_of<const float>("skip", tables.skip, ScalarType::Float, {1}, device);
    args.scalars = call.scratch.memory();
    args.num_states = lists.num_states();
    if (tables.origins != nullptr) set_origins(lists, tables, device, args);
    return call;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
