// Owns the checks of what elementwise optimizer ops are given, and their translation to UpdateArgs, for CPU and CUDA
// alike. Knows nothing of any one formula, nor of how the kernels are started.
#pragma once

#include <algorithm>

#include "core/update.h"
#include "torch/segment_table.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct NamedList {
    const char* name;
    const TensorList& list;
    bool optional = false;  // may be empty; then those after it are, too
};

const TensorList kNoTensors;

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

struct CheckedUpdate {  // the lists that were given; those that were not are empty
    CheckedList params, grads, copies;
    std::vector<CheckedList> states;
    bool loose;  // each segment brings its gradient as a tensor
};

struct UpdateCall {  // the kernels' arguments, and what they point into
    std::vector<UpdateTensor> tensors;
    Scratch scratch;
    UpdateArgs args;
    int64_t num_chunks;
};

// Whether each segment brings its gradient as a tensor. Where that and one per parameter have the same sizes, they mean
// the same: then a segment is all of its tensor.
inline bool has_loose_grads(const CheckedList& params, const CheckedList& grads, int64_t rows) {
    if (grads.size() != static_cast<size_t>(rows)) return false;
    if (grads.size() != params.size()) return true;
    for (size_t i = 0; i < params.size(); ++i) {
        if (grads[i].numel != params[i].numel) return true;
    }
    return false;
}

inline void require_grads(const CheckedUpdate& lists, Device device) {
    if (!lists.loose) return require_companion(lists.grads, lists.params);
    if (!device.is_cpu()) {
        fail("grads: got a tensor for each of %zu segments, expected %zu as in params: only a CPU takes them apart",
             lists.grads.size(), lists.params.size());
    }
}

// All states have one dtype.
inline void require_state_dtype(const UpdateLists& lists, const CheckedList& first, const CheckedList& state) {
    const bool narrow = lists.narrow_states && !first.empty() && first.dtype == dtype_code(ScalarType::BFloat16);
    require_dtype(state, narrow ? ScalarType::BFloat16 : ScalarType::Float);
}

inline CheckedUpdate checked_update(const UpdateLists& lists, int64_t rows, Device device) {
    CheckedUpdate checked{checked_list("params", lists.params, device),
                          checked_list("grads", lists.grads != nullptr ? *lists.grads : kNoTensors, device),
                          checked_list("copies", kNoTensors, device),
                          {},
                          false};
    const CheckedList& params = checked.params;
    if (lists.grads != nullptr) {
        checked.loose = has_loose_grads(params, checked.grads, rows);
        require_grads(checked, device);
    }
    checked.states.reserve(lists.states.size());
    for (const NamedList& state : lists.states) {
        checked.states.push_back(checked_list(state.name, state.list, device));
        if (state.optional && state.list.empty()) continue;
        require_companion(checked.states.back(), params);
        require_state_dtype(lists, checked.states[0], checked.states.back());
    }
    if (lists.copies.empty()) return checked;
    checked.copies = checked_list("copies", lists.copies, device);
    require_companion(checked.copies, params);
    if (checked.copies.dtype == dtype_code(ScalarType::Float)) {
        fail("copies: got float32, expected bfloat16 or float16");
    }
    return checked;
}

inline std::vector<UpdateTensor> update_tensors(const CheckedUpdate& lists, int num_states) {
    std::vector<UpdateTensor> tensors(lists.params.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i] = {lists.params[i].data, nullptr, {}, nullptr};
        if (!lists.grads.empty() && !lists.loose) tensors[i].grad = lists.grads[i].data;
        if (!lists.copies.empty()) tensors[i].copy = lists.copies[i].data;
        for (int k = 0; k < num_states; ++k) tensors[i].states[k] = lists.states[k][i].data;
    }
    return tensors;
}

struct Walk {  // of one parameter's update through one of its memories
    const char* name;
    Range memory;
};

struct Walks {
    Walk each[3 + kMaxStates];
    int count = 0;

    void add(const char* name, const void* memory, int64_t nbytes) {
        if (memory != nullptr && nbytes > 0) each[count++] = {name, range_at(memory, nbytes)};
    }
};

// Through all that a parameter's update walks together: not its gradient where that lies apart.
inline Walks walks_of(const CheckedUpdate& lists, size_t index, const UpdateTensor& tensor, const UpdateArgs& args) {
    const int64_t numel = lists.params[index].numel;
    Walks walks;
    walks.add("params", tensor.param, numel * bytes_of(args.param_dtype));
    walks.add("grads", tensor.grad, numel * bytes_of(args.grad_dtype));
    walks.add("copies", tensor.copy, numel * bytes_of(args.copy_dtype));
    for (int k = 0; k < args.num_states; ++k)
        walks.add(lists.states[k].name, tensor.states[k], numel * bytes_of(args.state_dtype));
    return walks;
}

// No two of the memories that one parameter's update walks may meet.
inline void require_apart(const CheckedUpdate& lists, const std::vector<UpdateTensor>& tensors,
                          const UpdateArgs& args) {
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Walks walks = walks_of(lists, i, tensors[i], args);
        for (int a = 0; a < walks.count; ++a) {
            for (int b = 0; b < a; ++b) {
                if (!walks.each[a].memory.overlaps(walks.each[b].memory)) continue;
                fail("%s[%zu]: got memory that overlaps %s[%zu], expected memory of its own", walks.each[a].name, i,
                     walks.each[b].name, i);
            }
        }
    }
}

// All that an update writes, in order of address, so that a range is compared with one of them and not with each.
class Written {
  public:
    Written(const CheckedUpdate& lists, const std::vector<UpdateTensor>& tensors, const UpdateArgs& args) {
        for (size_t i = 0; i < tensors.size(); ++i) {
            const Walks walks = walks_of(lists, i, tensors[i], args);
            for (int k = 0; k < walks.count; ++k) ranges_.push_back(walks.each[k].memory);
        }
        std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
        for (size_t i = 1; i < ranges_.size(); ++i) {  // from here on `end` is the furthest of all up to there
            if (ranges_[i].end < ranges_[i - 1].end) ranges_[i].end = ranges_[i - 1].end;
        }
    }

    bool overlaps(const Range& range) const {
        const auto after = std::lower_bound(ranges_.begin(), ranges_.end(), range.end,
                                            [](const Range& each, const char* end) { return each.begin < end; });
        return range.begin < range.end && after != ranges_.begin() && (after - 1)->end > range.begin;
    }

  private:
    std::vector<Range> ranges_;
};

// The addresses for each segment, whose gradient may lie anywhere but in what the update writes.
inline std::vector<UpdateTensor> tensors_by_segment(const CheckedUpdate& lists,
                                                    const std::vector<UpdateTensor>& tensors, const SegmentTable& table,
                                                    const UpdateArgs& args) {
    const Written written(lists, tensors, args);
    std::vector<UpdateTensor> found(table.num_rows);
    const int64_t size = bytes_of(args.grad_dtype);
    for (int64_t row = 0; row < table.num_rows; ++row) {
        const Segment& segment = table.rows[row];
        const Dense& grad = lists.grads[row];
        if (grad.numel != segment.numel) {
            fail("grads[%lld]: got %lld elements, expected %lld as in segments[%lld]", (long long)row,
                 (long long)grad.numel, (long long)segment.numel, (long long)row);
        }
        if (written.overlaps(range_at(grad.data, segment.numel * size))) {
            fail("grads[%lld]: got memory that overlaps what the update writes, expected memory of its own",
                 (long long)row);
        }
        found[row] = tensors[segment.tensor];
        found[row].grad = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(grad.data) -
                                                        static_cast<uintptr_t>(segment.begin * size));
    }
    return found;
}

// Where parameters are rounded at random: from what.
inline void set_origins(const CheckedList& params, const UpdateTables& tables, Device device, UpdateArgs& args) {
    if (!params.empty() && args.param_dtype != DType::bf16) {
        fail("params: got %s, expected bfloat16, the one that is rounded at random", dtype_name(params.dtype));
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

inline void set_tables(const UpdateTables& tables, Device device, UpdateArgs& args) {
    const int64_t rows = args.num_segments;
    args.steps = table_of<float>("steps", tables.steps, ScalarType::Float, {rows}, device);
    args.active = table_of<const uint8_t>("active", tables.active, ScalarType::Byte, {rows}, device);
    if (tables.grad_scale != nullptr) {
        args.grad_scale = table_of<const float>("grad_scale", *tables.grad_scale, ScalarType::Float, {1}, device);
    }
    args.skip = table_of<const float>("skip", tables.skip, ScalarType::Float, {1}, device);
}

inline int64_t rows_of(const Tensor& table) { return table.dim() == 2 ? table.sizes()[0] : 0; }

// columns: of a hyperparameter row; scalars_size: bytes of what a segment's scalars take.
inline UpdateCall update_call(const UpdateLists& given, const UpdateTables& tables, int64_t columns,
                              int64_t scalars_size, Device device) {
    const CheckedUpdate lists = checked_update(given, rows_of(tables.segments), device);
    const int64_t num_hyper_rows = rows_of(tables.hyper);
    const double* hyper =
        table_of<const double>("hyper", tables.hyper, ScalarType::Double, {num_hyper_rows, columns}, device);
    const SegmentTable table =
        segment_table(tables.segments, tables.chunk_offsets, num_hyper_rows, lists.params, device);
    const int64_t rows = table.num_rows;

    UpdateCall call{
        update_tensors(lists, given.num_states()), Scratch(rows * scalars_size, device), {}, table.num_chunks};
    UpdateArgs& args = call.args;
    args.param_dtype = float_dtype(lists.params);
    args.grad_dtype = given.grads == nullptr ? DType::none : float_dtype(lists.grads);
    args.state_dtype = lists.states.empty() ? DType::f32 : float_dtype(lists.states[0]);
    args.copy_dtype = lists.copies.empty() ? DType::none : float_dtype(lists.copies);
    args.num_states = given.num_states();
    require_apart(lists, call.tensors, args);
    args.num_tensors = static_cast<int64_t>(call.tensors.size());
    args.by_segment = lists.loose;
    if (lists.loose) call.tensors = tensors_by_segment(lists, call.tensors, table, args);
    args.tensors = call.tensors.data();
    args.chunk_offsets = table.chunk_offsets;
    args.segments = table.rows;
    args.num_segments = rows;
    args.hyper = hyper;
    set_tables(tables, device, args);
    args.scalars = call.scratch.memory();
    if (tables.origins != nullptr) set_origins(lists.params, tables, device, args);
    return call;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
