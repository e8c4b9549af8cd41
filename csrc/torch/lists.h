// Owns the questions that bindings ask of a list of tensors: one dtype, one device, dense memory, matching lengths.
// Knows nothing of segments or of any one op.
#pragma once

#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// Dense: the elements fill one stretch of memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
    if (tensor.is_contiguous() || tensor.numel() == 0) return true;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t dim = tensor.dim();
    int64_t expected = 1;
    for (int64_t placed = 0; placed < dim; ++placed) {  // find the next dimension outwards, and step over it
        int64_t next = -1;
        for (int64_t i = 0; i < dim && next < 0; ++i) {
            if (sizes[i] > 1 && strides[i] == expected) next = i;
        }
        if (next < 0) break;
        expected *= sizes[next];
    }
    return expected == tensor.numel();
}

// Two tensors of one shape whose elements lie in different orders cannot be walked together.
inline bool same_order(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim() || (a.is_contiguous() && b.is_contiguous())) return true;
    const int64_t dim = a.dim();
    for (int64_t i = 0; i < dim; ++i) {
        if (a.size(i) != b.size(i)) return true;  // another shape: the caller laid it out on purpose
    }
    for (int64_t i = 0; i < dim; ++i) {
        if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
    }
    return true;
}

inline void require_length(const char* name, const TensorList& list, size_t length, const char* like) {
    if (list.size() != length) {
        fail("%s: got %zu tensors, expected %zu as in %s", name, list.size(), length, like);
    }
}

// Checks that every tensor is dense, on `device`, of the first one's dtype.
inline void require_list(const char* name, const TensorList& list, Device device) {
    const int32_t dtype = list.empty() ? 0 : dtype_code(list[0]);
    for (size_t i = 0; i < list.size(); ++i) {
        const Tensor& tensor = list[i];
        if (!(device_of(tensor) == device)) {
            fail("%s[%zu]: got a tensor on %s, expected %s", name, i, describe(device_of(tensor)).text,
                 describe(device).text);
        }
        if (dtype_code(tensor) != dtype) {
            fail("%s[%zu]: got %s, expected %s as in %s[0]", name, i, dtype_name(tensor.scalar_type()),
                 dtype_name(list[0].scalar_type()), name);
        }
        if (!is_dense(tensor)) {
            fail("%s[%zu]: got shape %s with strides %s, expected a dense tensor without gaps or overlap", name, i,
                 shape_text(tensor).text, shape_text(tensor.strides().data(), tensor.dim()).text);
        }
        if (!fits_storage(tensor)) {
            fail("%s[%zu]: got a storage smaller than the tensor, expected its memory (is it freed or sharded?)", name,
                 i);
        }
    }
}

inline void require_dtype(const char* name, const TensorList& list, ScalarType dtype) {
    if (!list.empty() && !is_of(list[0], dtype)) {
        fail("%s: got %s, expected %s", name, dtype_name(list[0].scalar_type()), dtype_name(dtype));
    }
}

inline DType float_dtype(const char* name, const Tensor& tensor) {
    if (is_of(tensor, ScalarType::Float)) return DType::f32;
    if (is_of(tensor, ScalarType::BFloat16)) return DType::bf16;
    if (is_of(tensor, ScalarType::Half)) return DType::f16;
    fail("%s: got %s, expected float32, bfloat16 or float16", name, dtype_name(tensor.scalar_type()));
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline DType float_dtype(const char* name, const TensorList& list) {
    return list.empty() ? DType::f32 : float_dtype(name, list[0]);
}

// Checks a list that is walked together with `leader`: same length, numel and order of elements.
inline void require_companion(const char* name, const TensorList& list, const char* leader_name,
                              const TensorList& leader) {
    require_length(name, list, leader.size(), leader_name);
    for (size_t i = 0; i < list.size(); ++i) {
        if (list[i].numel() != leader[i].numel()) {
            fail("%s[%zu]: got %lld elements, expected %lld as in %s[%zu]", name, i, (long long)list[i].numel(),
                 (long long)leader[i].numel(), leader_name, i);
        }
        if (!same_order(list[i], leader[i])) {
            fail("%s[%zu]: got strides %s, expected %s as in %s[%zu], which has the same shape", name, i,
                 shape_text(list[i].strides().data(), list[i].dim()).text,
                 shape_text(leader[i].strides().data(), leader[i].dim()).text, leader_name, i);
        }
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
