// Owns the checks of flatten_'s and unflatten_'s arguments and their translation to FlattenArgs.
// Knows nothing of how the kernels are started.
#pragma once

#include "flatten/flatten.h"
#include "torch/lists.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

enum class Direction { flatten, unflatten };

struct FlattenCall {  // the kernels' arguments, and what they point into
    std::vector<Copy> copies;
    FlattenArgs args;
    int64_t numel;
};

inline void require_flat(const Tensor& flat, Device device) {
    if (!(device_of(flat) == device)) {
        fail("flat: got a tensor on %s, expected %s", describe(device_of(flat)).text, describe(device).text);
    }
    if (flat.dim() != 1 || !flat.is_contiguous()) {
        fail("flat: got shape %s with strides %s, expected a contiguous 1-D buffer", shape_text(flat).text,
             strides_text(flat).text);
    }
    if (!fits_storage(flat)) fail("flat: got a storage smaller than the tensor, expected its memory");
}

// A tensor that already lies at its place in the buffer is fine; any other sharing would be a race.
inline void require_outside(const Range& range, size_t index, const Range& flat, const char* place) {
    if (range.overlaps(flat) && range.begin != place) {
        fail("tensors[%zu]: got memory inside flat, away from its own start, expected memory of its own", index);
    }
}

inline int64_t require_start(const int64_t* starts, size_t index, int64_t numel, int64_t flat_numel) {
    const int64_t start = starts[index];
    if (start < 0 || start > flat_numel || numel > flat_numel - start) {
        fail("starts[%zu]: got %lld for a tensor of %lld elements, expected a place inside flat of %lld", index,
             (long long)start, (long long)numel, (long long)flat_numel);
    }
    return start;
}

inline FlattenArgs flatten_types(int32_t flat_dtype, const CheckedList& tensors, Direction direction) {
    FlattenArgs args = {};
    if (tensors.empty()) return args;
    if (flat_dtype == tensors.dtype) {
        args.raw_size = element_size(flat_dtype);
        return args;
    }
    const DType whole = float_dtype("flat", flat_dtype), part = float_dtype(tensors);
    args.to_dtype = direction == Direction::flatten ? whole : part;
    args.from_dtype = direction == Direction::flatten ? part : whole;
    return args;
}

inline FlattenCall flatten_call(const Tensor& flat, const TensorList& list, const Tensor& starts, Direction direction,
                                Device device) {
    require_flat(flat, device);
    const CheckedList tensors = checked_list("tensors", list, device);
    const int64_t count = static_cast<int64_t>(tensors.size());
    const int64_t* start_of = table_of<const int64_t>("starts", starts, ScalarType::Long, {count}, cpu_device());
    const int32_t dtype = flat.dtype_code();

    FlattenCall call{std::vector<Copy>(tensors.size()), flatten_types(dtype, tensors, direction), 0};
    const int64_t size = element_size(dtype), flat_numel = flat.numel();
    const int64_t part_size = tensors.empty() ? 0 : element_size(tensors.dtype);
    const Range range = range_at(flat.data_ptr(), flat_numel * size);
    int64_t covered = 0;  // end of the tensor before: starts usually ascend, and then overlap is cheap to see
    for (size_t i = 0; i < tensors.size(); ++i) {
        const int64_t numel = tensors[i].numel, start = require_start(start_of, i, numel, flat_numel);
        if (numel > 0 && i > 0 && start < covered && start >= start_of[i - 1]) {
            fail("starts[%zu]: got %lld, expected at least %lld, where the tensor before it ends", i, (long long)start,
                 (long long)covered);
        }
        covered = start + numel;
        char* const place = const_cast<char*>(range.begin) + start * size;
        void* const memory = tensors[i].data;
        require_outside(range_at(memory, numel * part_size), i, range, place);
        const bool into_flat = direction == Direction::flatten;
        call.copies[i] = {into_flat ? place : memory, into_flat ? memory : place, numel, call.numel};
        call.numel += numel;
    }
    call.args.copies = call.copies.data();
    call.args.num_copies = count;
    return call;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
