// Owns the contract of the adagrad stem: how to start its kernels.
// Knows nothing of tensors; deepcore/ops/reference/adagrad.py says what the operation means.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need: computed in fp64, rounded to fp32 once.
struct AdagradScalars {
    float grad_scale, decay;
    float step_size;  // lr / (1 + (t - 1) * lr_decay)
    float eps;
    int32_t form;
};

// prepare: segments [begin, end); it also advances their steps. apply: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void adagrad_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void adagrad_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;)

// Both passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_adagrad(const UpdateArgs& args, void* stream) noexcept;

}  // namespace deepcore
