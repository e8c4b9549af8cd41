// Owns how a binding holds the tensors that it is given: handles of torch's stable ABI, each with one owner, or views
// of memory that the caller keeps. Knows nothing of which answers are right; check.h does.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <utility>
#include <vector>

// libtorch hides its stable C++ types, so whatever holds one must be hidden too.
#define DEEPCORE_HIDDEN __attribute__((visibility("hidden")))

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// A tensor on a CPU as a direct call (direct.h) found it: within its storage, strided.
struct View {
    void* data;
    int64_t numel;
    const int64_t *sizes, *strides;  // torch's own
    int32_t dim, dtype_code;
    bool contiguous;
};

// torch::stable::Tensor shares each handle, which costs an allocation per tensor; a binding never shares one. Every
// question is a call into libtorch of 3 to 10 ns: of a list's tensors ask each once, see lists.h.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(AtenTensorHandle handle) noexcept : handle_(handle) {}
    explicit Tensor(const View& view) noexcept : view_(view) {}
    Tensor(Tensor&& other) noexcept : handle_(other.release()), view_(other.view_) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        view_ = other.view_;
        return *this;
    }
    ~Tensor() {
        if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
    }

    AtenTensorHandle get() const { return handle_; }
    AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

    void* data_ptr() const { return handle_ ? answer<void*>(aoti_torch_get_data_ptr) : view_.data; }
    int64_t dim() const { return handle_ ? answer<int64_t>(aoti_torch_get_dim) : view_.dim; }
    int64_t numel() const { return handle_ ? answer<int64_t>(aoti_torch_get_numel) : view_.numel; }
    const int64_t* sizes() const { return handle_ ? answer<int64_t*>(aoti_torch_get_sizes) : view_.sizes; }
    const int64_t* strides() const { return handle_ ? answer<int64_t*>(aoti_torch_get_strides) : view_.strides; }
    bool is_contiguous() const { return handle_ ? answer<bool>(aoti_torch_is_contiguous) : view_.contiguous; }
    int32_t device_type() const {
        return handle_ ? answer<int32_t>(aoti_torch_get_device_type) : aoti_torch_device_type_cpu();
    }
    int32_t device_index() const { return handle_ ? answer<int32_t>(aoti_torch_get_device_index) : 0; }
    int32_t dtype_code() const {  // what aoti_torch_dtype_*() return
        return handle_ ? answer<int32_t>(aoti_torch_get_dtype) : view_.dtype_code;
    }

    // Whether its storage reaches as far as its elements, which lie dense. nbytes: of all elements; size: of one.
    bool has_memory(int64_t nbytes, int64_t size) const {
        if (handle_ == nullptr || nbytes == 0) return true;
        return answer<int64_t>(aoti_torch_get_storage_offset) * size + nbytes <=
               answer<int64_t>(aoti_torch_get_storage_size);
    }

  private:
    template <class Answer>
    Answer answer(AOTITorchError (*question)(AtenTensorHandle, Answer*)) const {
        Answer found;
        TORCH_ERROR_CODE_CHECK(question(handle_, &found));
        return found;
    }

    AtenTensorHandle handle_ = nullptr;
    View view_ = {};  // where there is no handle
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
