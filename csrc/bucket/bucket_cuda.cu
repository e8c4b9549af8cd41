// Owns the CUDA kernel of the bucket stem and its launcher.
// Knows nothing of tensors. Every part is read once, whatever their number.
#include "bucket/bucket_math.h"
#include "core/launch.h"
#include "core/pack.cuh"

namespace deepcore {
namespace {

constexpr int kPack = 4;      // elements per access: 128 bits of fp32
constexpr int kTogether = 4;  // accesses of a thread that are on their way at once: with 1024 threads, enough for DRAM
constexpr int kBlockNumel = kBlockThreads * kPack * kTogether;
constexpr int kBlocksPerSm = 4;  // at most 64 registers, no spills

template <class T>
__device__ __forceinline__ void fetch(const T* from, float (&values)[kPack]) {
    load_floats(from, values);
}

template <class T>
__device__ __forceinline__ void fetch(const T* from, float (&values)[1]) {
    load(from, values[0]);
}

template <class T>
__device__ __forceinline__ void keep(T* to, const float (&values)[kPack]) {
    store_floats(to, values);
}

template <class T>
__device__ __forceinline__ void keep(T* to, const float (&values)[1]) {
    store(to, values[0]);
}

// The accesses of one thread, `width` elements each; first[u] is an offset into the block's elements, or -1.
template <int width>
struct Accesses {
    int first[kTogether];

    template <class T>
    __device__ __forceinline__ void fetch_all(const T* from, float (&values)[kTogether][width]) const {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            if (first[u] >= 0) fetch(from + first[u], values[u]);
        }
    }

    template <class T>
    __device__ __forceinline__ void keep_all(T* to, const float (&values)[kTogether][width]) const {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            if (first[u] >= 0) keep(to + first[u], values[u]);
        }
    }
};

// change(total, value) for every pair.
template <int width, class Change>
__device__ __forceinline__ void for_all(float (&totals)[kTogether][width], const float (&values)[kTogether][width],
                                        const Change& change) {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int k = 0; k < width; ++k) change(totals[u][k], values[u][k]);
    }
}

template <int width, class To, class From>
__device__ __forceinline__ void sum(const Accesses<width>& accesses, To* out, const From* part,
                                    const BucketArgs& args) {
    float totals[kTogether][width] = {}, values[kTogether][width] = {};
    accesses.fetch_all(part, totals);
    for (int64_t k = 1; k < args.num_parts; ++k) {
        part += args.numel;
        accesses.fetch_all(part, values);
        for_all(totals, values, [](float& total, float value) { total = total + value; });
    }
    if (args.accumulate) accesses.fetch_all(out, values);
    if (args.divide) {
        for_all(totals, values, [&](float& total, float) { total = total / args.by; });
    } else {
        for_all(totals, values, [&](float& total, float) { total = total * args.by; });
    }
    if (args.accumulate) for_all(totals, values, [](float& total, float before) { total = before + total; });
    accesses.keep_all(out, totals);
}

// A block's elements are cut as in for_each_pack, and each thread takes kTogether packs or elements at a time.
template <class To, class From>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm) bucket_kernel(const __grid_constant__ BucketArgs args) {
    const int64_t begin = blockIdx.x * static_cast<int64_t>(kBlockNumel), left = args.numel - begin;
    const int numel = static_cast<int>(left < kBlockNumel ? left : kBlockNumel);
    To* const out = static_cast<To*>(args.out) + begin;
    const From* const part = static_cast<const From*>(args.parts) + begin;

    const int lead = elements_to_boundary<kPack>(out);
    const bool together = elements_to_boundary<kPack>(part) == lead && (args.num_parts == 1 || args.numel % kPack == 0);
    const Cut parts = cut(numel, together ? lead : -1, kPack);
    Accesses<kPack> packs;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
        const int i = threadIdx.x + u * kBlockThreads;
        packs.first[u] = i < parts.packs ? parts.lead + i * kPack : -1;
    }
    if (parts.packs > 0) sum(packs, out, part, args);

    const int jump = parts.packs * kPack;
    for (int base = threadIdx.x; base < numel - jump; base += kTogether * kBlockThreads) {
        Accesses<1> singles;
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const int i = base + u * kBlockThreads;
            singles.first[u] = i >= numel - jump ? -1 : i < parts.lead ? i : i + jump;
        }
        sum(singles, out, part, args);
    }
}

template <class To, class From>
const char* launch(const BucketArgs& args, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>((args.numel + kBlockNumel - 1) / kBlockNumel);
    bucket_kernel<To, From><<<blocks, kBlockThreads, 0, stream>>>(args);
    return error_text(cudaGetLastError());
}

template <class To>
const char* launch_to(const BucketArgs& args, cudaStream_t stream) {
    if (args.part_dtype == DType::bf16) return launch<To, bf16>(args, stream);
    if (args.part_dtype == DType::f16) return launch<To, f16>(args, stream);
    return launch<To, float>(args, stream);
}

}  // namespace

const char* launch_bucket(const BucketArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.numel == 0) return nullptr;
    if (args.out_dtype == DType::bf16) return launch_to<bf16>(args, stream);
    if (args.out_dtype == DType::f16) return launch_to<f16>(args, stream);
    return launch_to<float>(args, stream);
}

}  // namespace deepcore
