// Owns the CUDA kernels of the adam stem and their launcher.
// Knows nothing of tensors. Capturable: whatever may change between replays is read from device memory.
#include "adam/adam_math.h"
#include "core/launch.h"
#include "core/pack.cuh"

namespace deepcore {
namespace {

constexpr int kPack = 4;            // elements per access: 128 bits of fp32
constexpr int64_t kCapacity = 600;  // tensors per launch; their addresses take 24 KB of the 32 KB of parameters
constexpr int kBlocksPerSm = 3;     // at most 80 registers, no spills; 768 threads with four loads each fill the memory

struct AdamBatch {
    AdamTensor tensors[kCapacity];
    int64_t first_tensor, num_tensors;
    int64_t first_chunk;
    const Segment* segments;
    int64_t num_segments;
    const AdamScalars* scalars;
    DType copy_dtype;
};

static_assert(sizeof(AdamBatch) <= 32764, "the limit of kernel parameters");

__global__ void prepare_kernel(AdamArgs args) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
    if (index < args.num_segments) adam_prepare_segment(args, index);
}

// One block's elements of one segment; all addresses are those of the first element.
template <class P, class G>
struct Elements {
    P* p;
    const G* g;
    float *m, *v;
    void* copy;
    DType copy_dtype;

    __device__ __forceinline__ int lead() const {
        const int lead = elements_to_boundary<kPack>(p);
        bool same = elements_to_boundary<kPack>(g) == lead && elements_to_boundary<kPack>(m) == lead &&
                    elements_to_boundary<kPack>(v) == lead;
        // bf16 and fp16 have one size, so either says where the copy's boundary is
        if (copy_dtype != DType::none) same = same && elements_to_boundary<kPack>(static_cast<bf16*>(copy)) == lead;
        return same ? lead : -1;
    }

    template <bool coupled>
    __device__ __forceinline__ void update_pack(int i, const AdamFactors<float>& factors) const {
        float param[kPack], grad[kPack], average[kPack], square[kPack];
        load_floats(p + i, param);
        load_floats(g + i, grad);
        load_floats(m + i, average);
        load_floats(v + i, square);
#pragma unroll
        for (int k = 0; k < kPack; ++k) adam_element<coupled>(param[k], grad[k], average[k], square[k], factors);
        store_floats(p + i, param);
        store_floats(m + i, average);
        store_floats(v + i, square);
        if (copy_dtype == DType::bf16) store_floats(static_cast<bf16*>(copy) + i, param);
        if (copy_dtype == DType::f16) store_floats(static_cast<f16*>(copy) + i, param);
    }

    template <bool coupled>
    __device__ __forceinline__ void update_one(int i, const AdamFactors<float>& factors) const {
        float param, grad, average, square;
        load(p + i, param);
        load(g + i, grad);
        load(m + i, average);
        load(v + i, square);
        adam_element<coupled>(param, grad, average, square, factors);
        store(p + i, param);
        store(m + i, average);
        store(v + i, square);
        if (copy_dtype == DType::bf16) store(static_cast<bf16*>(copy) + i, param);
        if (copy_dtype == DType::f16) store(static_cast<f16*>(copy) + i, param);
    }

    template <bool coupled>
    __device__ __forceinline__ void update(int numel, const AdamFactors<float>& factors) const {
        for_each_pack<kPack>(
            numel, lead(), threadIdx.x, [&](int i) { update_pack<coupled>(i, factors); },
            [&](int i) { update_one<coupled>(i, factors); });
    }
};

template <class P, class G>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm) apply_kernel(const __grid_constant__ AdamBatch batch) {
    const int64_t chunk = batch.first_chunk + blockIdx.x;
    const int64_t row = block_segment(batch.segments, batch.num_segments, chunk);
    const Segment segment = batch.segments[row];
    const AdamScalars scalars = batch.scalars[row];
    const int64_t index = segment.tensor - batch.first_tensor;
    if (!scalars.enabled || index < 0 || index >= batch.num_tensors) return;

    const Span span = chunk_span(segment, chunk);
    const AdamTensor& tensor = batch.tensors[index];
    const Elements<P, G> elements = {
        static_cast<P*>(tensor.param) + span.begin,
        static_cast<const G*>(tensor.grad) + span.begin,
        tensor.exp_avg + span.begin,
        tensor.exp_avg_sq + span.begin,
        batch.copy_dtype == DType::none ? nullptr : static_cast<bf16*>(tensor.copy) + span.begin,
        batch.copy_dtype,
    };
    const AdamFactors<float> factors = adam_factors<float>(scalars);
    const int numel = static_cast<int>(span.end - span.begin);
    if (scalars.coupled) {
        elements.template update<true>(numel, factors);
    } else {
        elements.template update<false>(numel, factors);
    }
}

template <class P, class G>
const char* apply(const AdamArgs& args, cudaStream_t stream) {
    AdamBatch batch;
    batch.segments = args.segments;
    batch.num_segments = args.num_segments;
    batch.scalars = args.scalars;
    batch.copy_dtype = args.copy_dtype;
    return for_each_batch(args.chunk_offsets, args.num_tensors, kCapacity,
                          [&](int64_t first, int64_t count, int64_t chunk, unsigned blocks) {
                              memcpy(batch.tensors, args.tensors + first, count * sizeof(AdamTensor));
                              batch.first_tensor = first;
                              batch.num_tensors = count;
                              batch.first_chunk = chunk;
                              apply_kernel<P, G><<<blocks, kBlockThreads, 0, stream>>>(batch);
                          });
}

template <class P>
const char* apply_to(const AdamArgs& args, cudaStream_t stream) {
    if (args.grad_dtype == DType::bf16) return apply<P, bf16>(args, stream);
    if (args.grad_dtype == DType::f16) return apply<P, f16>(args, stream);
    return apply<P, float>(args, stream);
}

}  // namespace

const char* launch_adam(const AdamArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.num_segments == 0) return nullptr;
    const auto blocks = static_cast<unsigned>((args.num_segments + kBlockThreads - 1) / kBlockThreads);
    prepare_kernel<<<blocks, kBlockThreads, 0, stream>>>(args);
    if (const char* text = error_text(cudaGetLastError())) return text;
    if (args.param_dtype == DType::bf16) return apply_to<bf16>(args, stream);
    if (args.param_dtype == DType::f16) return apply_to<f16>(args, stream);
    return apply_to<float>(args, stream);
}

}  // namespace deepcore
