// Owns the contract of the adam stem: how to start its kernels.
// Knows nothing of tensors; deepcore/ops/reference/adam.py says what the operation means.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need: computed in fp64, rounded to fp32 once.
struct AdamScalars {
    float grad_scale;
    float beta1, rest1;  // rest = 1 - beta
    float beta2, rest2;
    float decay;      // of the L2 kind; used where coupled
    float keep;       // 1 - lr * decay where decay is decoupled, else 1, which changes no bit
    float step_size;  // lr / (1 - beta1^t)
    float unbias2;    // 1 / sqrt(1 - beta2^t)
    float eps;
    int32_t form;
};

// The same where parameters are stored rounded at random.
struct StochasticAdamScalars : AdamScalars, RandomPlace {};

// prepare: segments [begin, end); it also advances their steps. apply: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void adam_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void adam_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void adam_stochastic_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void adam_stochastic_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;)

// Both passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_adam(const UpdateArgs& args, void* stream) noexcept;
const char* launch_adam_stochastic(const UpdateArgs& args, void* stream) noexcept;

}  // namespace deepcore
