// Owns the questions that every binding asks of a tensor, and the errors where the answer is wrong.
// Knows nothing of any one op. An error names the argument, what was given and what was expected.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <initializer_list>
#include <memory>
#include <stdexcept>

#include "core/dtype.h"
#include "torch/tensor.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

using torch::headeronly::ScalarType;

[[noreturn]] __attribute__((format(printf, 1, 2), noinline, cold)) inline void fail(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    throw std::runtime_error(text);
}

inline int32_t dtype_code(ScalarType dtype) {  // of those that ops ask for
    switch (dtype) {
        case ScalarType::Float:
            return aoti_torch_dtype_float32();
        case ScalarType::BFloat16:
            return aoti_torch_dtype_bfloat16();
        case ScalarType::Half:
            return aoti_torch_dtype_float16();
        case ScalarType::Double:
            return aoti_torch_dtype_float64();
        case ScalarType::Long:
            return aoti_torch_dtype_int64();
        case ScalarType::Byte:
            return aoti_torch_dtype_uint8();
        default:
            return -1;  // no tensor's
    }
}

inline bool is_of(const Tensor& tensor, ScalarType dtype) { return tensor.dtype_code() == dtype_code(dtype); }

struct Text {  // a short string without an allocation
    char text[160];
};

struct Device {
    int32_t type, index;
    bool operator==(const Device& other) const { return type == other.type && index == other.index; }
    bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
};

inline Device device_of(const Tensor& tensor) {
    const Device device = {tensor.device_type(), 0};
    return device.is_cpu() ? device : Device{device.type, tensor.device_index()};  // a CPU's is -1 here and 0 there
}

inline Text describe(Device device) {
    Text out;
    if (device.is_cpu()) {
        snprintf(out.text, sizeof out.text, "cpu");
    } else if (device.type == aoti_torch_device_type_cuda()) {
        snprintf(out.text, sizeof out.text, "cuda:%d", device.index);
    } else {
        snprintf(out.text, sizeof out.text, "device type %d", device.type);
    }
    return out;
}

inline const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Byte:
            return "uint8";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline const char* dtype_name(int32_t code) {
    return dtype_name(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code)));
}

inline const char* dtype_name(const Tensor& tensor) { return dtype_name(tensor.dtype_code()); }

inline Text shape_text(const int64_t* sizes, int64_t dim) {
    Text out;
    int used = snprintf(out.text, sizeof out.text, "(");
    for (int64_t i = 0; i < dim && used < 120; ++i) {
        used += snprintf(out.text + used, sizeof out.text - used, i ? ", %lld" : "%lld", (long long)sizes[i]);
    }
    snprintf(out.text + used, sizeof out.text - used, dim == 1 ? ",)" : ")");
    return out;
}

inline Text shape_text(const Tensor& tensor) { return shape_text(tensor.sizes(), tensor.dim()); }

inline Text strides_text(const Tensor& tensor) { return shape_text(tensor.strides(), tensor.dim()); }

inline Device cpu_device() { return {aoti_torch_device_type_cpu(), 0}; }

inline int64_t element_size(int32_t dtype) { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }

// A tensor whose storage was resized to less than it spans would be read beyond its end. `tensor`: dense.
inline bool fits_storage(const Tensor& tensor) {
    const int64_t size = element_size(tensor.dtype_code());
    return tensor.has_memory(tensor.numel() * size, size);
}

// The memory of a contiguous table argument with exactly this dtype, shape and device.
inline void* table_memory(const char* name, const Tensor& tensor, ScalarType dtype,
                          std::initializer_list<int64_t> shape, Device device) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    const int64_t* const sizes = tensor.sizes();
    int64_t numel = 1;
    for (size_t i = 0; same && i < shape.size(); ++i) {
        same = sizes[i] == shape.begin()[i];
        numel *= sizes[i];
    }
    const int32_t code = tensor.dtype_code();
    if (!same || code != dtype_code(dtype) || !(device_of(tensor) == device) || !tensor.is_contiguous()) {
        fail("%s: got %s %s on %s%s, expected contiguous %s %s on %s", name, dtype_name(code), shape_text(tensor).text,
             describe(device_of(tensor)).text, tensor.is_contiguous() ? "" : " (strided)", dtype_name(dtype),
             shape_text(shape.begin(), shape.size()).text, describe(device).text);
    }
    if (!fits_storage(tensor)) {
        fail("%s: got a storage smaller than the tensor, expected its memory", name);
    }
    return tensor.data_ptr();
}

template <class T>
T* table_of(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
            Device device) {
    return static_cast<T*>(table_memory(name, tensor, dtype, shape, device));
}

// A new uninitialised 1-D tensor. dtype: what an aoti_torch_dtype_*() function returns.
inline Tensor empty(int64_t numel, int32_t dtype, Device device) {
    constexpr int64_t kStride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &numel, &kStride, dtype, device.type, device.index, &handle));
    return Tensor(handle);
}

// Memory for the length of one call. The kernels of a CPU take the host's own: a tensor would cost a microsecond.
class Scratch {
  public:
    Scratch(int64_t nbytes, Device device) {
        if (device.is_cpu()) {
            host_.reset(new double[nbytes / sizeof(double) + 1]);  // not zeroed
        } else {
            tensor_ = std::make_unique<Tensor>(empty(nbytes, aoti_torch_dtype_uint8(), device));
        }
    }
    void* memory() const { return host_ ? host_.get() : tensor_->data_ptr(); }

  private:
    std::unique_ptr<double[]> host_;
    std::unique_ptr<Tensor> tensor_;
};

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
