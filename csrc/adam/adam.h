// Owns the contract of the adam stem: the arguments of its kernels and how to start them.
// Knows nothing of tensors; deepcore/ops/reference/adam.py says what the operation means.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"
#include "core/segments.h"

namespace deepcore {

constexpr int64_t kHyperColumns = 8;

struct AdamTensor {  // base addresses; the same element index holds for all five
    void* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* copy;  // null where no low-precision copy is wanted
};

// What one segment's elements need: computed in fp64 by adam_prepare, rounded to fp32 once.
struct AdamScalars {
    float grad_scale;
    float beta1, rest1;  // rest = 1 - beta
    float beta2, rest2;
    float decay;      // of the L2 kind; used where coupled
    float keep;       // 1 - lr * decay where decay is decoupled, else 1, which changes no bit
    float step_size;  // lr / (1 - beta1^t)
    float unbias2;    // 1 / sqrt(1 - beta2^t)
    float eps;
    int32_t enabled;  // 0: leave the segment alone
    int32_t coupled;
};

struct AdamArgs {
    DType param_dtype, grad_dtype, copy_dtype;
    const AdamTensor* tensors;  // (num_tensors,) on the host, for CUDA too
    int64_t num_tensors;
    const int64_t* chunk_offsets;  // (num_tensors + 1,) on the host
    const Segment* segments;       // (num_segments,) from here on: on the tensors' device
    int64_t num_segments;
    const double* hyper;      // (rows, kHyperColumns)
    float* steps;             // (num_segments,)
    const uint8_t* active;    // (num_segments,)
    const float* grad_scale;  // (1,)
    const float* skip;        // (1,)
    AdamScalars* scalars;     // (num_segments,) scratch: prepare writes, apply reads
};

// prepare: segments [begin, end); it also advances their steps. apply: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void adam_prepare(const AdamArgs& args, int64_t begin, int64_t end) noexcept;
                      void adam_apply(const AdamArgs& args, int64_t begin, int64_t end) noexcept;)

// Both passes on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_adam(const AdamArgs& args, void* stream) noexcept;

}  // namespace deepcore
