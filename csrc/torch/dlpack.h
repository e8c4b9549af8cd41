// Owns what DLPack 1 lays down (dmlc/dlpack, "C Exchange API"): how a tensor is described, and the table of functions
// with which a framework describes its Python objects. Knows nothing of torch. torch's own copy of that header is not
// for libraries of its stable ABI.
#pragma once

#include <stdint.h>

namespace deepcore {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;  // a device type
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Version {
    uint32_t major, minor;
};

struct Device {
    int32_t type, index;
};

struct DataType {  // code: 0 signed, 1 unsigned, 2 IEEE, 4 bfloat
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t dim;
    DataType dtype;
    int64_t *sizes, *strides;  // strides count elements
    uint64_t byte_offset;
};

struct ManagedTensor {
    Version version;
    void* context;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// Functions return 0, or -1 with a Python error set. None of them waits for a device.
struct Exchange {
    Version version;
    Exchange* earlier;
    int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
    int (*managed_from_object)(void*, ManagedTensor**);
    int (*object_from_managed)(ManagedTensor*, void**);  // takes the tensor over
    int (*describe)(void*, Tensor*);  // of a Python object, which keeps all that it points to; may be null
    int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace dlpack
}  // namespace deepcore
