// Owns the contract of the lion stem: how to start its kernels.
// Knows nothing of tensors; deepcore/ops/reference/lion.py says what the operation means.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need: computed in fp64, rounded to fp32 once.
struct LionScalars {
    float grad_scale;
    float beta1, rest1;  // rest = 1 - beta
    float beta2, rest2;
    float keep;  // 1 - lr * decay, or 1, which changes no bit
    float lr;
    int32_t form;
};

// prepare: segments [begin, end); it also advances their steps. apply: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void lion_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void lion_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;)

// Both passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_lion(const UpdateArgs& args, void* stream) noexcept;

}  // namespace deepcore
