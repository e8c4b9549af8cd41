// Owns the CUDA kernels of the cast stem and their launcher.
// Knows nothing of tensors. Capturable: the seed is read from device memory.
#include "cast/cast_math.h"
#include "core/launch.h"
#include "core/typed_pack.cuh"

namespace deepcore {
namespace {

constexpr int kTogether = 4;  // accesses of a thread that are on their way at once
constexpr int kBlockNumel = kBlockThreads * kTypedPack * kTogether;

// A block's elements are cut as in for_each_pack, and each thread takes kTogether packs at a time.
__global__ void __launch_bounds__(kBlockThreads) nearest_kernel(CastArgs args) {
    const int64_t begin = blockIdx.x * static_cast<int64_t>(kBlockNumel), left = args.numel - begin;
    const int numel = static_cast<int>(left < kBlockNumel ? left : kBlockNumel);
    const TypedPointer from = typed(args.source, args.source_dtype, begin), to = typed(args.out, args.out_dtype, begin);
    const int lead = to.to_boundary();
    const Cut parts = cut(numel, from.to_boundary() == lead ? lead : -1, kTypedPack);
    RawElements<kTypedPack> raw[kTogether] = {};
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
        const int i = threadIdx.x + u * kBlockThreads;
        if (i < parts.packs) raw[u] = fetch<kTypedPack>(from, parts.lead + i * kTypedPack);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
        const int i = threadIdx.x + u * kBlockThreads;
        float values[kTypedPack];
        widen(raw[u], args.source_dtype, values);
        if (i < parts.packs) keep(to, parts.lead + i * kTypedPack, values);
    }
    const int jump = parts.packs * kTypedPack;  // the single elements lie before and after the packs
    for (int k = threadIdx.x; k < numel - jump; k += kBlockThreads) {
        const int i = k < parts.lead ? k : k + jump;
        float value[1];
        widen(fetch<1>(from, i), args.source_dtype, value);
        keep(to, i, value);
    }
}

// A thread per block of random bits; eight elements lie in one 128-bit word of bf16 where the addresses allow it.
__global__ void __launch_bounds__(kBlockThreads) random_kernel(CastArgs args) {
    const int64_t block = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
    const int64_t begin = block * kCastBlock;
    if (begin >= args.numel) return;
    const float* const from = static_cast<const float*>(args.source) + begin;
    uint16_t* const to = static_cast<uint16_t*>(args.out) + begin;
    const bool whole = begin + kCastBlock <= args.numel && reinterpret_cast<uintptr_t>(from) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(to) % 16 == 0;
    uint32_t bits[kCastBlock] = {}, words[4];
    if (whole) {
        const uint4 low = reinterpret_cast<const uint4*>(from)[0], high = reinterpret_cast<const uint4*>(from)[1];
        bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
        bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
    } else {
#pragma unroll
        for (int k = 0; k < kCastBlock; ++k) {
            if (begin + k < args.numel) bits[k] = __float_as_uint(from[k]);
        }
    }
    philox(static_cast<uint64_t>(block), 0, static_cast<uint64_t>(*args.seed), words[0], words[1], words[2], words[3]);
    uint16_t rounded[kCastBlock];
#pragma unroll
    for (int k = 0; k < kCastBlock; ++k) {
        rounded[k] = round_to_bfloat(bits[k], (words[k / 2] >> (k % 2 * 16)) & 0xffffu);
    }
    if (whole) {
        uint32_t out[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) out[k] = rounded[2 * k] | static_cast<uint32_t>(rounded[2 * k + 1]) << 16;
        __stwb(reinterpret_cast<uint4*>(to), make_uint4(out[0], out[1], out[2], out[3]));
        return;
    }
#pragma unroll
    for (int k = 0; k < kCastBlock; ++k) {
        if (begin + k < args.numel) to[k] = rounded[k];
    }
}

}  // namespace

const char* launch_cast(const CastArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.numel == 0) return nullptr;
    if (args.seed != nullptr) {
        const int64_t numel = kBlockThreads * kCastBlock;
        const auto blocks = static_cast<unsigned>((args.numel + numel - 1) / numel);
        random_kernel<<<blocks, kBlockThreads, 0, stream>>>(args);
    } else {
        const auto blocks = static_cast<unsigned>((args.numel + kBlockNumel - 1) / kBlockNumel);
        nearest_kernel<<<blocks, kBlockThreads, 0, stream>>>(args);
    }
    return error_text(cudaGetLastError());
}

}  // namespace deepcore
