// Owns the walk of a formula over chunks on a CPU; include it in a stem's *_cpu.cpp only.
// Knows nothing of any one formula. It works in fp32 on tiles that stay in the nearest cache: parameters and gradients
// of 16 bits are widened into one and rounded out of it, so that each variant of a formula is compiled once for all
// dtypes.
#pragma once

#include <type_traits>

#include "core/convert.h"
#include "core/update.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int64_t kTileNumel = 512;

struct TilePointers {  // of one tile, in fp32
    float* param;
    const float* grad;
    float* states[kMaxStates];
};

template <class Formula, class V, class Form>
DEEPCORE_FN void update(const TilePointers& at, int64_t i, const typename Formula::template Factors<V>& factors,
                        Form form) {
    V param, grad = {}, states[kMaxStates] = {};
    load(at.param + i, param);
    if (Formula::kReadsGrads) load(at.grad + i, grad);
    for (int k = 0; k < Formula::states(form); ++k) load(at.states[k] + i, states[k]);
    Formula::element(param, grad, states, factors, form);
    store(at.param + i, param);
    for (int k = 0; k < Formula::states(form) && Formula::kWritesStates; ++k) store(at.states[k] + i, states[k]);
}

template <class Formula, class Form>
void update_tile(const TilePointers& at, int64_t numel, const typename Formula::Scalars& scalars, Form form) {
    const auto many = Formula::template spread<vec>(scalars);
    int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) update<Formula, vec>(at, i, many, form);
    const auto one = Formula::template spread<float>(scalars);
    for (; i < numel; ++i) update<Formula, float>(at, i, one, form);
}

// Calls the variant of the formula that `scalars` asks for.
template <class Formula, int form = 0>
void update_tile_in_form(const TilePointers& at, int64_t numel, const typename Formula::Scalars& scalars) {
    if (scalars.form == form) {
        update_tile<Formula>(at, numel, scalars, std::integral_constant<int, form>());
    } else if constexpr (form + 1 < Formula::kForms) {
        update_tile_in_form<Formula, form + 1>(at, numel, scalars);
    }
}

template <class Formula>
void update_chunk(const UpdateArgs& args, const UpdateTensor& tensor, Span span,
                  const typename Formula::Scalars& scalars) {
    float params[kTileNumel], grads[kTileNumel];
    const bool wide_params = args.param_dtype == DType::f32;
    const bool wide_grads = args.grad_dtype == DType::f32 || !Formula::kReadsGrads;
    const int64_t tile = wide_params && wide_grads && args.copy_dtype == DType::none ? kChunkNumel : kTileNumel;
    for (int64_t begin = span.begin; begin < span.end; begin += tile) {
        const int64_t numel = begin + tile < span.end ? tile : span.end - begin;
        TilePointers at = {wide_params ? static_cast<float*>(tensor.param) + begin : params,
                           wide_grads ? static_cast<const float*>(tensor.grad) + begin : grads,
                           {}};
        for (int k = 0; k < Formula::kStates && args.has_states; ++k) at.states[k] = tensor.states[k] + begin;
        widen(tensor.param, args.param_dtype, begin, params, numel);
        if (Formula::kReadsGrads) widen(tensor.grad, args.grad_dtype, begin, grads, numel);
        update_tile_in_form<Formula>(at, numel, scalars);
        narrow(at.param, tensor.param, args.param_dtype, begin, numel);
        narrow(at.param, tensor.copy, args.copy_dtype, begin, numel);
    }
}

template <class Formula>
void prepare_range(const UpdateArgs& args, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) prepare_segment<Formula>(args, index);
}

template <class Formula>
void apply_range(const UpdateArgs& args, int64_t begin, int64_t end) {
    const auto* const scalars = static_cast<const typename Formula::Scalars*>(args.scalars);
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t, Span span) {
        if (scalars[row].form == kLeftAlone) return;
        update_chunk<Formula>(args, args.tensors[args.segments[row].tensor], span, scalars[row]);
    });
}

}  // namespace

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
