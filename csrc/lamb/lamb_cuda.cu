// Owns the CUDA kernels of the lamb stem and their launchers: moments, sums per chunk, sums per segment; then the
// update. Knows nothing of tensors. Each sum has a fixed order, so results repeat bit for bit.
#include "core/reduce.cuh"
#include "core/update.cuh"
#include "lamb/lamb_math.h"

namespace deepcore {
namespace {

// One block's elements of one segment; all addresses are those of the first element.
struct MomentsElements {
    TypedPointer param, grad;
    float *exp_avg, *exp_avg_sq;

    __device__ __forceinline__ int lead() const {
        const int lead = param.to_boundary();
        const bool same = grad.to_boundary() == lead && elements_to_boundary<kTypedPack>(exp_avg) == lead &&
                          elements_to_boundary<kTypedPack>(exp_avg_sq) == lead;
        return same ? lead : -1;
    }

    template <int width>
    __device__ __forceinline__ void update(int i, const LambFactors<float>& factors, int form,
                                           double (&sums)[2]) const {
        const RawElements<width> raw_param = fetch<width>(param, i), raw_grad = fetch<width>(grad, i);
        float params[width], grads[width], averages[width], squares[width];
        fetch(exp_avg + i, averages);
        fetch(exp_avg_sq + i, squares);
        widen(raw_param, param.dtype, params);
        widen(raw_grad, grad.dtype, grads);
#pragma unroll
        for (int j = 0; j < width; ++j) {
            const double p = params[j];
            const double u = LambMoments::element(params[j], grads[j], averages[j], squares[j], factors, form);
            sums[0] = fma(p, p, sums[0]);
            sums[1] = fma(u, u, sums[1]);
        }
        keep(exp_avg + i, averages);
        keep(exp_avg_sq + i, squares);
    }
};

__global__ void __launch_bounds__(kBlockThreads, kUpdateBlocksPerSm)
    moments_kernel(const __grid_constant__ UpdateBatch batch, double* partials) {
    __shared__ double scratch[2][kBlockThreads / 32];
    const int64_t chunk = batch.first_chunk + blockIdx.x;
    const int64_t row = block_segment(batch.segments, batch.num_segments, chunk);
    const Segment segment = batch.segments[row];
    const LambScalars scalars = static_cast<const LambScalars*>(batch.scalars)[row];
    const int64_t index = segment.tensor - batch.first_tensor;
    if (scalars.form == kLeftAlone || index < 0 || index >= batch.num_tensors) return;

    const Span span = chunk_span(segment, chunk);
    const UpdateTensor& tensor = batch.tensors[index];
    const MomentsElements elements = {
        typed(tensor.param, batch.param_dtype, span.begin), typed(tensor.grad, batch.grad_dtype, span.begin),
        static_cast<float*>(tensor.states[0]) + span.begin, static_cast<float*>(tensor.states[1]) + span.begin};
    const auto factors = LambMoments::spread<float>(scalars);
    double sums[2] = {};
    for_each_pack<kTypedPack>(
        static_cast<int>(span.end - span.begin), elements.lead(), threadIdx.x,
        [&](int i) { elements.update<kTypedPack>(i, factors, scalars.form, sums); },
        [&](int i) { elements.update<1>(i, factors, scalars.form, sums); });
    const double weights = reduce_block(sums[0], scratch[0], Add());
    const double updates = reduce_block(sums[1], scratch[1], Add());
    if (threadIdx.x == 0) {
        partials[2 * chunk] = weights;
        partials[2 * chunk + 1] = updates;
    }
}

__global__ void __launch_bounds__(kBlockThreads) squares_kernel(LambMomentsArgs args) {
    __shared__ double scratch[2][kBlockThreads / 32];
    const Segment& segment = args.segments[blockIdx.x];
    const bool alone = static_cast<const LambScalars*>(args.scalars)[blockIdx.x].form == kLeftAlone;
    const int64_t chunks = alone ? 0 : num_chunks(segment.numel);
    double sums[2] = {};
    for (int64_t k = threadIdx.x; k < chunks; k += kBlockThreads) {
        sums[0] += args.partials[2 * (segment.first_chunk + k)];
        sums[1] += args.partials[2 * (segment.first_chunk + k) + 1];
    }
    const double weights = reduce_block(sums[0], scratch[0], Add());
    const double updates = reduce_block(sums[1], scratch[1], Add());
    if (threadIdx.x == 0) {
        args.squares[2 * blockIdx.x] = weights;
        args.squares[2 * blockIdx.x + 1] = updates;
    }
}

__global__ void __launch_bounds__(kBlockThreads) apply_prepare_kernel(LambApplyArgs args) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
    if (index < args.num_segments) prepare_lamb_apply(args, index);
}

}  // namespace

const char* launch_lamb_moments(const LambMomentsArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.num_segments == 0) return nullptr;
    if (const char* text = launch_prepare<LambMoments>(args, stream)) return text;
    const char* text = for_each_update_batch(args, [&](const UpdateBatch& batch, unsigned blocks) {
        moments_kernel<<<blocks, kBlockThreads, 0, stream>>>(batch, args.partials);
    });
    if (text != nullptr) return text;
    squares_kernel<<<static_cast<unsigned>(args.num_segments), kBlockThreads, 0, stream>>>(args);
    return error_text(cudaGetLastError());
}

const char* launch_lamb_apply(const LambApplyArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.num_segments == 0) return nullptr;
    const auto blocks = static_cast<unsigned>((args.num_segments + kBlockThreads - 1) / kBlockThreads);
    apply_prepare_kernel<<<blocks, kBlockThreads, 0, stream>>>(args);
    if (const char* text = error_text(cudaGetLastError())) return text;
    return launch_apply<LambApply>(args, stream);
}

}  // namespace deepcore
