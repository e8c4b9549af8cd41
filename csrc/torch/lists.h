// Owns the questions that bindings ask of a list of tensors: one dtype, one device, dense memory, matching lengths.
// Knows nothing of segments or of any one op.
#pragma once

#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// Dense: the elements fill one stretch of memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
    const int64_t *const sizes = tensor.sizes(), *const strides = tensor.strides();
    const int64_t dim = tensor.dim(), numel = tensor.numel();
    int64_t expected = 1;
    for (int64_t placed = 0; placed < dim; ++placed) {  // find the next dimension outwards, and step over it
        int64_t next = -1;
        for (int64_t i = 0; i < dim && next < 0; ++i) {
            if (sizes[i] > 1 && strides[i] == expected) next = i;
        }
        if (next < 0) break;
        expected *= sizes[next];
    }
    return expected == numel || numel == 0;
}

// Two tensors of one shape whose elements lie in different orders cannot be walked together.
inline bool same_order(const Tensor& a, const Tensor& b) {
    const int64_t dim = a.dim();
    if (dim != b.dim()) return true;
    const int64_t *const a_sizes = a.sizes(), *const b_sizes = b.sizes();
    for (int64_t i = 0; i < dim; ++i) {
        if (a_sizes[i] != b_sizes[i]) return true;  // another shape: the caller laid it out on purpose
    }
    const int64_t *const a_strides = a.strides(), *const b_strides = b.strides();
    for (int64_t i = 0; i < dim; ++i) {
        if (a_sizes[i] > 1 && a_strides[i] != b_strides[i]) return false;
    }
    return true;
}

struct Dense {  // what is known of a tensor once it is checked
    void* data;
    int64_t numel;
};

struct CheckedList {  // dense tensors of one dtype on one device
    const char* name;
    TensorSpan tensors;
    int32_t dtype;    // as Tensor::dtype_code(); without meaning where there are no tensors
    bool contiguous;  // all of them
    std::vector<Dense> dense;

    size_t size() const { return dense.size(); }
    bool empty() const { return dense.empty(); }
    const Dense& operator[](size_t index) const { return dense[index]; }
};

// The error for a tensor that is not what the others of its list are.
[[noreturn]] __attribute__((noinline, cold)) inline void fail_in_list(const char* name, TensorSpan list, size_t index,
                                                                      Device device) {
    const Tensor& tensor = list[index];
    if (!(device_of(tensor) == device)) {
        fail("%s[%zu]: got a tensor on %s, expected %s", name, index, describe(device_of(tensor)).text,
             describe(device).text);
    }
    if (tensor.dtype_code() != list[0].dtype_code()) {
        fail("%s[%zu]: got %s, expected %s as in %s[0]", name, index, dtype_name(tensor), dtype_name(list[0]), name);
    }
    if (!tensor.is_contiguous() && !is_dense(tensor)) {
        fail("%s[%zu]: got shape %s with strides %s, expected a dense tensor without gaps or overlap", name, index,
             shape_text(tensor).text, strides_text(tensor).text);
    }
    fail("%s[%zu]: got a storage smaller than the tensor, expected its memory (is it freed or sharded?)", name, index);
}

// Checks that every tensor is dense, on `device`, of the first one's dtype.
inline CheckedList checked_list(const char* name, TensorSpan list, Device device) {
    CheckedList checked{name, list, list.empty() ? 0 : list[0].dtype_code(), true, std::vector<Dense>(list.size())};
    const int64_t size = list.empty() ? 0 : element_size(checked.dtype);
    const bool on_cpu = device.is_cpu();
    for (size_t i = 0; i < list.size(); ++i) {
        const Tensor& tensor = list[i];
        const bool alike = tensor.device_type() == device.type && (on_cpu || tensor.device_index() == device.index) &&
                           tensor.dtype_code() == checked.dtype;
        const bool contiguous = alike && tensor.is_contiguous();
        const int64_t numel = tensor.numel();
        if (!alike || !(contiguous || is_dense(tensor)) || !tensor.has_memory(numel * size, size)) {
            fail_in_list(name, list, i, device);
        }
        checked.contiguous &= contiguous;
        checked.dense[i] = {tensor.data_ptr(), numel};
    }
    return checked;
}

inline void require_dtype(const CheckedList& list, ScalarType dtype) {
    if (!list.empty() && list.dtype != dtype_code(dtype)) {
        fail("%s: got %s, expected %s", list.name, dtype_name(list.dtype), dtype_name(dtype));
    }
}

inline DType float_dtype(const char* name, int32_t code) {
    if (code == dtype_code(ScalarType::Float)) return DType::f32;
    if (code == dtype_code(ScalarType::BFloat16)) return DType::bf16;
    if (code == dtype_code(ScalarType::Half)) return DType::f16;
    fail("%s: got %s, expected float32, bfloat16 or float16", name, dtype_name(code));
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline DType float_dtype(const CheckedList& list) {
    return list.empty() ? DType::f32 : float_dtype(list.name, list.dtype);
}

// Checks a list that is walked together with `leader`: same length, numel and order of elements.
inline void require_companion(const CheckedList& list, const CheckedList& leader) {
    if (list.size() != leader.size()) {
        fail("%s: got %zu tensors, expected %zu as in %s", list.name, list.size(), leader.size(), leader.name);
    }
    for (size_t i = 0; i < list.size(); ++i) {
        if (list[i].numel != leader[i].numel) {
            fail("%s[%zu]: got %lld elements, expected %lld as in %s[%zu]", list.name, i, (long long)list[i].numel,
                 (long long)leader[i].numel, leader.name, i);
        }
        if ((list.contiguous && leader.contiguous) || same_order(list.tensors[i], leader.tensors[i])) continue;
        fail("%s[%zu]: got strides %s, expected %s as in %s[%zu], which has the same shape", list.name, i,
             strides_text(list.tensors[i]).text, strides_text(leader.tensors[i]).text, leader.name, i);
    }
}

struct Range {  // bytes [begin, end)
    const char *begin, *end;
    bool overlaps(const Range& other) const {
        return begin < end && other.begin < other.end && begin < other.end && other.begin < end;
    }
};

inline Range range_at(const void* memory, int64_t nbytes) {
    const char* const begin = static_cast<const char*>(memory);
    return {begin, begin + nbytes};
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
