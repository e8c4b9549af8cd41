// Owns the contract of the sgd stem: how to start its kernels.
// Knows nothing of tensors; deepcore/ops/reference/sgd.py says what the operation means.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need: rounded from fp64 to fp32 once.
struct SgdScalars {
    float grad_scale, decay;
    float momentum, rest;  // rest = 1 - dampening
    float lr;
    int32_t form;
};

// prepare: segments [begin, end); it also advances their steps. apply: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void sgd_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void sgd_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;)

// Both passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_sgd(const UpdateArgs& args, void* stream) noexcept;

}  // namespace deepcore
