// Owns the contract of the cast stem: the arguments of its kernels and how to start them.
// Knows nothing of tensors; deepcore/ops/reference/cast.py says what the operation means.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace deepcore {

struct CastArgs {
    DType out_dtype, source_dtype;
    void* out;
    const void* source;
    int64_t numel;
    const int64_t* seed;  // (1,) on the device, for stochastic rounding from fp32 to bf16; null: to nearest even
    bool streaming;       // CPU: write around the caches
};

// Elements [begin, end); with a seed, begin is a multiple of kCastBlock.
constexpr int64_t kCastBlock = 8;  // elements that share one block of random bits
DEEPCORE_FOR_EACH_ISA(void cast_range(const CastArgs& args, int64_t begin, int64_t end) noexcept;)

// On a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_cast(const CastArgs& args, void* stream) noexcept;

}  // namespace deepcore
