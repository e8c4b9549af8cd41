// Owns the CUDA kernels of the grad_stats stem and their launcher: chunks, then segments, then the summary.
// Knows nothing of tensors. Each pass sums in a fixed order, so results repeat bit for bit.
#include "core/launch.h"
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "grad_stats/grad_stats_math.h"

namespace deepcore {
namespace {

constexpr int64_t kCapacity = 3000;  // tensors per launch; their addresses take 24 KB of the 32 KB of parameters

struct GradBatch {
    const void* grads[kCapacity];
    int64_t first_tensor, num_tensors;
    int64_t first_chunk;
    const Segment* segments;
    int64_t num_segments;
    double* partials;
};

static_assert(sizeof(GradBatch) <= 32764, "the limit of kernel parameters");

template <class T>
__device__ __forceinline__ void add_squares(const T* x, int numel, double& sum) {
    constexpr int kPack = 16 / sizeof(T);
    for_each_pack<kPack>(
        numel, elements_to_boundary<kPack>(x), threadIdx.x,
        [&](int i) {
            float values[kPack];
            load_floats(x + i, values);
#pragma unroll
            for (int k = 0; k < kPack; ++k)
                sum = fma(static_cast<double>(values[k]), static_cast<double>(values[k]), sum);
        },
        [&](int i) {
            double value;
            load(x + i, value);
            sum = fma(value, value, sum);
        });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) chunks_kernel(const __grid_constant__ GradBatch batch) {
    __shared__ double scratch[kBlockThreads / 32];
    const int64_t chunk = batch.first_chunk + blockIdx.x;
    const Segment segment = batch.segments[block_segment(batch.segments, batch.num_segments, chunk)];
    const int64_t index = segment.tensor - batch.first_tensor;
    if (index < 0 || index >= batch.num_tensors) return;

    const Span span = chunk_span(segment, chunk);
    double sum = 0;
    add_squares(static_cast<const T*>(batch.grads[index]) + span.begin, static_cast<int>(span.end - span.begin), sum);
    sum = reduce_block(sum, scratch, Add());
    if (threadIdx.x == 0) batch.partials[chunk] = sum;
}

__global__ void __launch_bounds__(kBlockThreads) segments_kernel(GradStatsArgs args) {
    __shared__ double scratch[kBlockThreads / 32];
    const Segment& segment = args.segments[blockIdx.x];
    const int64_t chunks = num_chunks(segment.numel);
    double sum = 0;
    for (int64_t k = threadIdx.x; k < chunks; k += kBlockThreads) sum += args.partials[segment.first_chunk + k];
    sum = reduce_block(sum, scratch, Add());
    if (threadIdx.x == 0) args.squares[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kBlockThreads) summary_kernel(GradStatsArgs args) {
    __shared__ double scratch[kBlockThreads / 32], other[kBlockThreads / 32];
    const double none = static_cast<double>(args.num_segments);
    double sum = 0, first_bad = none;
    for (int64_t k = threadIdx.x; k < args.num_segments; k += kBlockThreads) {
        const double square = args.squares[k];
        sum += square;
        if (!is_finite(square) && first_bad == none) first_bad = static_cast<double>(k);
    }
    sum = reduce_block(sum, scratch, Add());
    first_bad = reduce_block(first_bad, other, Smaller());
    if (threadIdx.x == 0) {
        args.summary[0] = sum;
        args.summary[1] = first_bad < none ? 1 : 0;
        args.summary[2] = first_bad < none ? first_bad : -1;
    }
}

template <class T>
const char* sum_chunks(const GradStatsArgs& args, cudaStream_t stream) {
    GradBatch batch;
    batch.segments = args.segments;
    batch.num_segments = args.num_segments;
    batch.partials = args.partials;
    return for_each_batch(args.chunk_offsets, args.num_tensors, kCapacity,
                          [&](int64_t first, int64_t count, int64_t chunk, unsigned blocks) {
                              memcpy(batch.grads, args.grads + first, count * sizeof(void*));
                              batch.first_tensor = first;
                              batch.num_tensors = count;
                              batch.first_chunk = chunk;
                              chunks_kernel<T><<<blocks, kBlockThreads, 0, stream>>>(batch);
                          });
}

const char* sum_all_chunks(const GradStatsArgs& args, cudaStream_t stream) {
    if (args.dtype == DType::bf16) return sum_chunks<bf16>(args, stream);
    if (args.dtype == DType::f16) return sum_chunks<f16>(args, stream);
    return sum_chunks<float>(args, stream);
}

}  // namespace

const char* launch_grad_stats(const GradStatsArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (const char* text = sum_all_chunks(args, stream)) return text;
    if (args.num_segments > 0) {
        segments_kernel<<<static_cast<unsigned>(args.num_segments), kBlockThreads, 0, stream>>>(args);
    }
    summary_kernel<<<1, kBlockThreads, 0, stream>>>(args);
    return error_text(cudaGetLastError());
}

}  // namespace deepcore
