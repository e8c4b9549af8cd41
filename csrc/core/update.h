// Owns the arguments of kernels that update parameters element by element, and the scalars of their segments.
// Knows nothing of any one formula. A formula is a struct with: kColumns of its hyperparameter row, kStates, kForms
// (variants of the formula, compiled apart where that pays), kReadsGrads, kWritesStates, kNarrowStates (they may be of
// 16 bits), Scalars (POD, with `form`), Factors<V> and spread (Scalars over the lanes of V), states(form) (how many of
// its states that variant touches), scalars(row, t, grad_scale, num_states), element.
#pragma once

#include "core/cpu_dispatch.h"
#include "core/dtype.h"
#include "core/segments.h"

namespace deepcore {

constexpr int kMaxStates = 3;

struct UpdateTensor {  // base addresses; the same element index holds for all of them
    void* param;
    const void* grad;
    void* states[kMaxStates];
    void* copy;  // null where no low-precision copy is wanted
};

struct UpdateArgs {
    DType param_dtype, grad_dtype, state_dtype, copy_dtype;
    const UpdateTensor* tensors;  // (num_tensors,), or a segment each, on the host, for CUDA too
    int64_t num_tensors;
    const int64_t* chunk_offsets;  // (num_tensors + 1,) on the host
    const Segment* segments;       // (num_segments,) from here on: on the tensors' device
    int64_t num_segments;
    const double* hyper;      // (rows, columns of the formula)
    float* steps;             // (num_segments,)
    const uint8_t* active;    // (num_segments,)
    const float* grad_scale;  // (1,)
    const float* skip;        // (1,)
    void* scalars;            // (num_segments,) scratch of the formula's Scalars: prepare writes, apply reads
    int num_states;           // that were given: states[k] is null from there on
    bool by_segment;          // tensors[row] is of that segment: its gradient lies apart from the others; CPU only
};

// The addresses for segment `row`; a gradient that lies apart is addressed as if it were part of a longer one.
DEEPCORE_FN const UpdateTensor& tensor_of(const UpdateArgs& args, int64_t row) {
    return args.tensors[args.by_segment ? row : args.segments[row].tensor];
}

constexpr int kLeftAlone = -1;  // the form of a segment that is not updated

// t: this step's number, 1 at the first. Inactive segments, and all of them under `skip`, keep their step counts.
template <class Formula>
DEEPCORE_FN void prepare_segment(const UpdateArgs& args, int64_t index) {
    typename Formula::Scalars& scalars = static_cast<typename Formula::Scalars*>(args.scalars)[index];
    if (*args.skip != 0 || args.active[index] == 0) {
        scalars.form = kLeftAlone;
        return;
    }
    const float t = args.steps[index] + 1;
    args.steps[index] = t;
    const double* row = args.hyper + args.segments[index].hyper * Formula::kColumns;
    scalars = Formula::scalars(row, t, *args.grad_scale, args.num_states);
}

}  // namespace deepcore
