// Owns the current CUDA stream and device of a binding, and the error of a launch.
// Knows nothing of CUDA's headers: a binding compiles against a torch without CUDA.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

inline Device cuda_device_of(const char* name, const Tensor& tensor) {
    const Device device = device_of(tensor);
    if (device.type != aoti_torch_device_type_cuda()) {
        fail("%s: got a tensor on %s, expected a CUDA device", name, describe(device).text);
    }
    return device;
}

// torch's headers declare this function only for CUDA builds, and a library linked on a machine without one has no link
// to the library that defines it. A CUDA tensor exists only where libtorch_cuda is loaded, so it is looked up there.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream find_current_stream() {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
        if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, kName);
    }
    return reinterpret_cast<CurrentStream>(symbol);
}

inline void* current_stream(Device device) {
    static const CurrentStream current = find_current_stream();
    if (current == nullptr) fail("libtorch_cuda.so: got none with a current stream, expected a torch built with CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current(device.index, &stream));
    return stream;
}

// start(stream) with `device` current and on its current stream; it returns null or what went wrong.
template <class Start>
void launch_on(Device device, const char* op, const Start& start) {
    const torch::stable::accelerator::DeviceGuard guard(device.index);
    const char* const text = start(current_stream(device));
    if (text != nullptr) fail("%s: the launch on cuda:%d failed: %s", op, device.index, text);
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
