// Owns the walk of a formula over chunks on a GPU, and its launcher; include it in a stem's *_cuda.cu only.
// Knows nothing of any one formula. Capturable: whatever may change between replays is read from device memory.
#pragma once

#include "core/launch.h"
#include "core/typed_pack.cuh"
#include "core/update.h"

namespace deepcore {
namespace {

constexpr int64_t kUpdateCapacity = 600;  // tensors per launch; their addresses take 28 KB of the 32 KB of parameters
constexpr int kUpdateBlocksPerSm = 3;     // at most 80 registers; 768 threads with four loads each fill the memory

struct UpdateBatch {
    UpdateTensor tensors[kUpdateCapacity];
    int64_t first_tensor, num_tensors;
    int64_t first_chunk;
    const Segment* segments;
    int64_t num_segments;
    const void* scalars;
    DType param_dtype, grad_dtype, state_dtype, copy_dtype;
};

static_assert(sizeof(UpdateBatch) <= 32764, "the limit of kernel parameters");

// How parameters are stored. Another way has these members, too.
struct ToNearest {
    static constexpr bool kBfloatAlone = false;  // whether parameters are bf16 without copies, known to the compiler
    template <class Scalars>                     // and the element of the tensor that is number 0 below
    __device__ __forceinline__ ToNearest(const Scalars&, int64_t) {}

    template <int width>
    __device__ __forceinline__ void operator()(const TypedPointer& to, int i, const float (&values)[width]) const {
        keep(to, i, values);
    }
};

// One block's elements of one segment; all addresses are those of the first element.
template <class Formula>
struct UpdateElements {
    TypedPointer param, grad, copy;
    TypedPointer states[Formula::kStates];
    int num_states;  // that this segment's form touches

    __device__ __forceinline__ int lead() const {
        const int lead = param.to_boundary();
        bool same = (!Formula::kReadsGrads || grad.to_boundary() == lead) &&
                    (copy.dtype == DType::none || copy.to_boundary() == lead);
#pragma unroll
        for (int k = 0; k < Formula::kStates; ++k) {
            if (k < num_states) same = same && states[k].to_boundary() == lead;
        }
        return same ? lead : -1;
    }

    template <int width, class Factors, class Store>
    __device__ __forceinline__ void update(int i, const Factors& factors, int form, const Store& store) const {
        const RawElements<width> raw_param = fetch<width>(param, i);
        RawElements<width> raw_grad = {};
        if constexpr (Formula::kReadsGrads) raw_grad = fetch<width>(grad, i);
        RawElements<width> raw_states[Formula::kStates] = {};
        float new_states[kMaxStates][width] = {}, params[width], grads[width];
#pragma unroll
        for (int k = 0; k < Formula::kStates; ++k) {
            if (k < num_states) raw_states[k] = fetch<width>(states[k], i);
        }
        widen(raw_param, param.dtype, params);
        widen(raw_grad, grad.dtype, grads);
#pragma unroll
        for (int k = 0; k < Formula::kStates; ++k) widen(raw_states[k], states[k].dtype, new_states[k]);
#pragma unroll
        for (int j = 0; j < width; ++j) {
            float element_states[kMaxStates];
            for (int k = 0; k < kMaxStates; ++k) element_states[k] = new_states[k][j];
            Formula::element(params[j], grads[j], element_states, factors, form);
            for (int k = 0; k < kMaxStates; ++k) new_states[k][j] = element_states[k];
        }
#pragma unroll
        for (int k = 0; k < Formula::kStates; ++k) {
            if (Formula::kWritesStates && k < num_states) keep(states[k], i, new_states[k]);
        }
        store(param, i, params);
        keep(copy, i, params);
    }
};

template <class Formula>
__global__ void __launch_bounds__(kBlockThreads) prepare_kernel(UpdateArgs args) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
    if (index < args.num_segments) prepare_segment<Formula>(args, index);
}

template <class Formula, class Store>
__global__ void __launch_bounds__(kBlockThreads, kUpdateBlocksPerSm)
    apply_kernel(const __grid_constant__ UpdateBatch batch) {
    const int64_t chunk = batch.first_chunk + blockIdx.x;
    const int64_t row = block_segment(batch.segments, batch.num_segments, chunk);
    const Segment segment = batch.segments[row];
    const auto& kept = static_cast<const typename Formula::Scalars*>(batch.scalars)[row];
    const auto scalars = kept;
    const int64_t index = segment.tensor - batch.first_tensor;
    if (scalars.form == kLeftAlone || index < 0 || index >= batch.num_tensors) return;

    const Span span = chunk_span(segment, chunk);
    const UpdateTensor& tensor = batch.tensors[index];
    UpdateElements<Formula> elements = {
        typed(tensor.param, Store::kBfloatAlone ? DType::bf16 : batch.param_dtype, span.begin),
        typed(tensor.grad, batch.grad_dtype, span.begin),
        typed(tensor.copy, Store::kBfloatAlone ? DType::none : batch.copy_dtype, span.begin),
        {},
        Formula::states(scalars.form)};
#pragma unroll
    for (int k = 0; k < Formula::kStates; ++k) {
        const DType dtype = Formula::kNarrowStates ? batch.state_dtype : DType::f32;
        elements.states[k] = {nullptr, dtype};
        if (k < elements.num_states) elements.states[k] = typed(tensor.states[k], dtype, span.begin);
    }
    const auto factors = Formula::template spread<float>(scalars);
    const Store store(kept, span.begin);
    for_each_pack<kTypedPack>(
        static_cast<int>(span.end - span.begin), elements.lead(), threadIdx.x,
        [&](int i) { elements.template update<kTypedPack>(i, factors, scalars.form, store); },
        [&](int i) { elements.template update<1>(i, factors, scalars.form, store); });
}

template <class Formula>
const char* launch_prepare(const UpdateArgs& args, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>((args.num_segments + kBlockThreads - 1) / kBlockThreads);
    prepare_kernel<Formula><<<blocks, kBlockThreads, 0, stream>>>(args);
    return error_text(cudaGetLastError());
}

// launch(batch, number of chunks) for every batch of tensors.
template <class Launch>
const char* for_each_update_batch(const UpdateArgs& args, const Launch& launch) {
    UpdateBatch batch;
    batch.segments = args.segments;
    batch.num_segments = args.num_segments;
    batch.scalars = args.scalars;
    batch.param_dtype = args.param_dtype;
    batch.grad_dtype = args.grad_dtype;
    batch.state_dtype = args.state_dtype;
    batch.copy_dtype = args.copy_dtype;
    return for_each_batch(args.chunk_offsets, args.num_tensors, kUpdateCapacity,
                          [&](int64_t first, int64_t count, int64_t chunk, unsigned blocks) {
                              memcpy(batch.tensors, args.tensors + first, count * sizeof(UpdateTensor));
                              batch.first_tensor = first;
                              batch.num_tensors = count;
                              batch.first_chunk = chunk;
                              launch(batch, blocks);
                          });
}

template <class Formula, class Store = ToNearest>
const char* launch_apply(const UpdateArgs& args, cudaStream_t stream) {
    return for_each_update_batch(args, [&](const UpdateBatch& batch, unsigned blocks) {
        apply_kernel<Formula, Store><<<blocks, kBlockThreads, 0, stream>>>(batch);
    });
}

// Both passes. Returns null, or the CUDA runtime's text for what went wrong.
template <class Formula, class Store = ToNearest>
const char* launch_update(const UpdateArgs& args, void* stream_pointer) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.num_segments == 0) return nullptr;
    if (const char* text = launch_prepare<Formula>(args, stream)) return text;
    return launch_apply<Formula, Store>(args, stream);
}

}  // namespace
}  // namespace deepcore
