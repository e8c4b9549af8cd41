// Owns the walk of a formula over chunks on a CPU; include it in a stem's *_cpu.cpp only.
// Knows nothing of any one formula, each variant of which is compiled once for all dtypes: the types of gradient and
// copy are asked element by element, a branch that costs nothing beside the memory; parameters and states of 16 bits,
// read and written, pass through tiles in the nearest cache.
#pragma once

#include <type_traits>

#include "core/convert.h"
#include "core/update.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int64_t kTileNumel = 128;  // more would interrupt the streams that the hardware prefetches

struct Operand {  // dtype none: nothing is there
    char* memory;
    DType dtype;
};

DEEPCORE_FN Operand operand(const void* memory, DType dtype, int64_t begin) {
    if (dtype == DType::none) return {nullptr, dtype};
    return {static_cast<char*>(const_cast<void*>(memory)) + begin * size_of(dtype), dtype};
}

template <class V>
DEEPCORE_FN void fetch(const Operand& from, int64_t i, V& x) {
    if (from.dtype == DType::f32) load(reinterpret_cast<const float*>(from.memory) + i, x);
    if (from.dtype == DType::bf16) load(reinterpret_cast<const bf16*>(from.memory) + i, x);
    if (from.dtype == DType::f16) load(reinterpret_cast<const f16*>(from.memory) + i, x);
}

// Never fp32.
template <class V>
DEEPCORE_FN void keep_low(const Operand& to, int64_t i, V x) {
    if (to.dtype == DType::bf16) store(reinterpret_cast<bf16*>(to.memory) + i, x);
    if (to.dtype == DType::f16) store(reinterpret_cast<f16*>(to.memory) + i, x);
}

struct UpdateRun {  // elements that lie side by side; each address is that of the first one
    float* param;
    float* states[kMaxStates];
    Operand grad, copy;
};

template <class Formula, class V, class Form>
DEEPCORE_FN void update(const UpdateRun& at, int64_t i, const typename Formula::template Factors<V>& factors,
                        Form form) {
    constexpr int kUsed = Formula::states(Form::value), kWritten = Formula::kWritesStates ? kUsed : 0;
    V param, grad = {}, states[kMaxStates] = {};
    load(at.param + i, param);
    if (Formula::kReadsGrads) fetch(at.grad, i, grad);
    if constexpr (kUsed > 0) load(at.states[0] + i, states[0]);  // written out: a loop keeps the array in memory
    if constexpr (kUsed > 1) load(at.states[1] + i, states[1]);
    if constexpr (kUsed > 2) load(at.states[2] + i, states[2]);
    Formula::element(param, grad, states, factors, form);
    store(at.param + i, param);
    keep_low(at.copy, i, param);
    if constexpr (kWritten > 0) store(at.states[0] + i, states[0]);
    if constexpr (kWritten > 1) store(at.states[1] + i, states[1]);
    if constexpr (kWritten > 2) store(at.states[2] + i, states[2]);
}

template <class Formula, class Form>
void update_run(const UpdateRun at, int64_t numel, const typename Formula::Scalars& scalars, Form form) {
    const auto many = Formula::template spread<vec>(scalars);
    int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) update<Formula, vec>(at, i, many, form);
    const auto one = Formula::template spread<float>(scalars);
    for (; i < numel; ++i) update<Formula, float>(at, i, one, form);
}

// Calls the variant of the formula that `scalars` asks for.
template <class Formula, int form = 0>
void update_run_in_form(const UpdateRun& at, int64_t numel, const typename Formula::Scalars& scalars) {
    if (scalars.form == form) {
        update_run<Formula>(at, numel, scalars, std::integral_constant<int, form>());
    } else if constexpr (form + 1 < Formula::kForms) {
        update_run_in_form<Formula, form + 1>(at, numel, scalars);
    }
}

// How parameters of 16 bits are stored. Another way has these members, too; it is made from a segment's scalars.
struct ToNearest {
    template <class Scalars>
    explicit ToNearest(const Scalars&) {}

    // Elements before `begin` that are worked on with it: the tile that begins there is shorter by as many.
    int64_t lead(int64_t) const { return 0; }

    void keep(const float* from, void* to, DType dtype, int64_t begin, int64_t numel) const {
        narrow(from, to, dtype, begin, numel);
    }
};

// Where a run is worked on: in the tensors themselves, or in tiles.
template <class Formula>
struct Tile {
    const UpdateArgs& args;
    const UpdateTensor& tensor;
    int used;  // states of the form
    alignas(64) float params[kTileNumel];
    alignas(64) float states[Formula::kNarrowStates ? Formula::kStates : 1][kTileNumel];

    Tile(const UpdateArgs& args, const UpdateTensor& tensor, int used) : args(args), tensor(tensor), used(used) {}

    bool wide_params() const { return args.param_dtype == DType::f32; }
    bool wide_states() const { return !Formula::kNarrowStates || args.state_dtype == DType::f32; }
    int64_t step() const { return wide_params() && wide_states() ? kChunkNumel : kTileNumel; }

    UpdateRun open(int64_t begin, int64_t numel) {
        UpdateRun at = {wide_params() ? static_cast<float*>(tensor.param) + begin : params,
                        {},
                        operand(tensor.grad, args.grad_dtype, begin),
                        operand(tensor.copy, args.copy_dtype, begin)};
        widen(tensor.param, args.param_dtype, begin, params, numel);
        for (int k = 0; k < used; ++k) {
            at.states[k] = wide_states() ? static_cast<float*>(tensor.states[k]) + begin : states[k];
            if (!wide_states()) widen(tensor.states[k], args.state_dtype, begin, states[k], numel);
        }
        return at;
    }

    template <class Store>
    void close(const Store& store, int64_t begin, int64_t numel) const {
        store.keep(params, tensor.param, args.param_dtype, begin, numel);
        for (int k = 0; k < used && !wide_states(); ++k)
            narrow(states[k], tensor.states[k], args.state_dtype, begin, numel);
    }
};

template <class Formula, class Store>
void update_chunk(const UpdateArgs& args, const UpdateTensor& tensor, Span span,
                  const typename Formula::Scalars& scalars) {
    Tile<Formula> tile(args, tensor, Formula::states(scalars.form));
    const Store store(scalars);
    const int64_t step = tile.step();
    for (int64_t begin = span.begin, numel; begin < span.end; begin += numel) {
        numel = step - store.lead(begin);
        if (begin + numel > span.end) numel = span.end - begin;
        update_run_in_form<Formula>(tile.open(begin, numel), numel, scalars);
        tile.close(store, begin, numel);
    }
}

template <class Formula>
void prepare_range(const UpdateArgs& args, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) prepare_segment<Formula>(args, index);
}

template <class Formula, class Store = ToNearest>
void apply_range(const UpdateArgs& args, int64_t begin, int64_t end) {
    const auto* const scalars = static_cast<const typename Formula::Scalars*>(args.scalars);
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t, Span span) {
        if (scalars[row].form == kLeftAlone) return;
        update_chunk<Formula, Store>(args, tensor_of(args, row), span, scalars[row]);
    });
}

}  // namespace

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
