// Owns the contract of the muon stem: the arguments of its two passes and how to start them.
// Knows nothing of tensors or matrices; deepcore/ops/reference/muon.py says what the operations mean.
#pragma once

#include "core/update.h"

namespace deepcore {

// What one segment's elements need in either pass: computed in fp64, rounded to fp32 once.
struct MuonScalars {
    float grad_scale;
    float rest;  // 1 - momentum
    float keep;  // 1 - lr * decay
    float rate;  // lr * ratio; second pass only
    int32_t form;
};

struct MuonApplyArgs : UpdateArgs {
    const double* ratios;  // (num_segments,)
};

// prepare: segments [begin, end); that of the momentum also advances their steps. chunks: chunks [begin, end).
DEEPCORE_FOR_EACH_ISA(void muon_momentum_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void muon_momentum_chunks(const UpdateArgs& args, int64_t begin, int64_t end) noexcept;
                      void muon_apply_prepare(const MuonApplyArgs& args, int64_t begin, int64_t end) noexcept;
                      void muon_apply_chunks(const MuonApplyArgs& args, int64_t begin, int64_t end) noexcept;)

// All of one pass on a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_muon_momentum(const UpdateArgs& args, void* stream) noexcept;
const char* launch_muon_apply(const MuonApplyArgs& args, void* stream) noexcept;

}  // namespace deepcore
