// Owns the arguments of kernels that update parameters element by element, and the scalars of their segments.
// Knows nothing of any one formula. A formula is a struct with: kColumns of its hyperparameter row, kStates, kForms
// (variants of the formula, compiled apart where that pays), kReadsGrads, kWritesStates, kNarrowStates (they may be of
// 16 bits), Scalars (POD, with `form`), Factors<V> and spread (Scalars over the lanes of V), states(form) (how many of
// its states that variant touches), scalars(row, t, grad_scale, num_states), element. Where RandomPlace is a base of
// its Scalars, parameters are stored rounded at random.
#pragma once

#include <type_traits>

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

    // Where parameters are rounded at random, on the tensors' device.
    const int64_t* origins =
        nullptr;                    // (num_segments, 2): number of the parameter, its element that the segment begins
    const int64_t* seed = nullptr;  // (1,)
};

// Which random bits the parameters of a segment add before they are cut to bf16. They follow from the seed, the
// parameter, the step and the place of an element in its parameter: from nothing that a shard or a thread could change.
struct RandomPlace {
    uint64_t seed, stream;
    int64_t shift;  // element i of the tensor is number i + shift of the parameter
};

// The upper half of philox's counter.
DEEPCORE_FN uint64_t random_stream(int64_t param, float t) {
    return static_cast<uint64_t>(static_cast<uint32_t>(t)) << 32 | static_cast<uint32_t>(param);
}

DEEPCORE_FN void set_random_place(const UpdateArgs& args, int64_t index, float t, RandomPlace& place) {
    const int64_t* const origin = args.origins + 2 * index;
    place.seed = static_cast<uint64_t>(*args.seed);
    place.stream = random_stream(origin[0], t);
    place.shift = origin[1] - args.segments[index].begin;
}

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
    if constexpr (std::is_base_of_v<RandomPlace, typename Formula::Scalars>) set_random_place(args, index, t, scalars);
}

}  // namespace deepcore
