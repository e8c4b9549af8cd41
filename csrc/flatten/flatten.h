// Owns the contract of the flatten stem: a list of copies, each contiguous on both sides.
// Knows nothing of tensors or direction: flatten_ and unflatten_ differ only in who is source.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace deepcore {

struct Copy {
    void* to;
    const void* from;
    int64_t numel;
    int64_t first;  // elements of all copies before this one
};

struct FlattenArgs {
    const Copy* copies;  // (num_copies,) on the host, for CUDA too
    int64_t num_copies;
    DType to_dtype, from_dtype;
    int64_t raw_size;  // bytes of an element where both sides have one dtype, of any kind; else 0: convert
    bool streaming;    // CPU: write around the caches
};

// Elements [begin, end) of the copies laid end to end.
DEEPCORE_FOR_EACH_ISA(void flatten_range(const FlattenArgs& args, int64_t begin, int64_t end) noexcept;)

// On a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_flatten(const FlattenArgs& args, void* stream) noexcept;

}  // namespace deepcore
