// Owns the contract of the lamb stem: the arguments of its two passes and how to start them.
// Knows nothing of tensors; deepcore/ops/reference/lamb.py says what the operations mean.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need in either pass: computed in fp64, rounded to fp32 once.
struct LambScalars {
    float grad_scale;
    float beta1, rest1;  // rest = 1 - beta
    float beta2, rest2;
    float unbias1, unbias2;  // 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
    float eps, decay;
    float step_size;  // lr * ratio; second pass only
    int32_t form;
};

struct LambMomentsArgs : UpdateArgs {
    double* partials;  // (chunks, 2) scratch: the sums of squares of each chunk's weights and updates
    double* squares;   // (num_segments, 2)
};

struct LambApplyArgs : UpdateArgs {
    const double* squares;  // (num_segments, 2), of the whole tensor that a segment belongs to
};

// prepare: segments [begin, end); that of the moments also advances their steps. chunks and apply: chunks [begin, end).
// finish: partials into squares, on one thread.
DEEPCORE_FOR_EACH_ISA(void lamb_moments_prepare(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept;
                      void lamb_moments_chunks(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept;
                      void lamb_moments_finish(const LambMomentsArgs& args) noexcept;
                      void lamb_apply_prepare(const LambApplyArgs& args, int64_t begin, int64_t end) noexcept;
                      void lamb_apply_chunks(const LambApplyArgs& args, int64_t begin, int64_t end) noexcept;)

// All of one pass on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_lamb_moments(const LambMomentsArgs& args, void* stream) noexcept;
const char* launch_lamb_apply(const LambApplyArgs& args, void* stream) noexcept;

}  // namespace deepcore
