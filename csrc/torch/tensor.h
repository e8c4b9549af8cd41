// Owns how a binding holds the tensors that it is given: handles of torch's stable ABI, each with one owner.
// Knows nothing of which answers are right; check.h does.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <utility>
#include <vector>

// libtorch hides its stable C++ types, so whatever holds one must be hidden too.
#define DEEPCORE_HIDDEN __attribute__((visibility("hidden")))

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// torch::stable::Tensor shares each handle, which costs an allocation per tensor; a binding never shares one. Every
// question is a call into libtorch of 3 to 10 ns: of a list's tensors ask each once, see lists.h.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(AtenTensorHandle handle) noexcept : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
    }

    AtenTensorHandle get() const { return handle_; }
    AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

    void* data_ptr() const { return answer<void*>(aoti_torch_get_data_ptr); }
    int64_t dim() const { return answer<int64_t>(aoti_torch_get_dim); }
    int64_t numel() const { return answer<int64_t>(aoti_torch_get_numel); }
    const int64_t* sizes() const { return answer<int64_t*>(aoti_torch_get_sizes); }
    const int64_t* strides() const { return answer<int64_t*>(aoti_torch_get_strides); }
    bool is_contiguous() const { return answer<bool>(aoti_torch_is_contiguous); }
    int64_t storage_offset() const { return answer<int64_t>(aoti_torch_get_storage_offset); }  // elements
    int64_t storage_size() const { return answer<int64_t>(aoti_torch_get_storage_size); }      // bytes
    int32_t device_type() const { return answer<int32_t>(aoti_torch_get_device_type); }
    int32_t device_index() const { return answer<int32_t>(aoti_torch_get_device_index); }
    int32_t dtype_code() const { return answer<int32_t>(aoti_torch_get_dtype); }  // what aoti_torch_dtype_*() return

  private:
    template <class Answer>
    Answer answer(AOTITorchError (*question)(AtenTensorHandle, Answer*)) const {
        Answer found;
        TORCH_ERROR_CODE_CHECK(question(handle_, &found));
        return found;
    }

    AtenTensorHandle handle_ = nullptr;
};

using TensorList = std::vector<Tensor>;

struct TensorSpan {  // a list, or one tensor as a list
    const Tensor* first;
    size_t count;

    TensorSpan(const TensorList& list) : first(list.data()), count(list.size()) {}
    TensorSpan(const Tensor& tensor) : first(&tensor), count(1) {}
    size_t size() const { return count; }
    bool empty() const { return count == 0; }
    const Tensor& operator[](size_t index) const { return first[index]; }
};

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
