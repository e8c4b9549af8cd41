// Owns the CUDA kernel of the flatten stem and its launcher.
// Knows nothing of tensors or direction.
#include "core/launch.h"
#include "core/pack.cuh"
#include "flatten/flatten_math.h"

namespace deepcore {
namespace {

constexpr int64_t kCapacity = 900;  // copies per launch: 28 KB of the 32 KB of parameters

struct FlattenBatch {
    Copy copies[kCapacity];  // `first` counts chunks here, from the launch's own beginning
    int64_t num_copies;
};

static_assert(sizeof(FlattenBatch) <= 32764, "the limit of kernel parameters");

// How a block moves elements: `pack` of them at aligned addresses, or one.
template <class Unit>
struct CopyUnits {
    using To = Unit;
    using From = Unit;
    static constexpr int pack = 16 / sizeof(Unit);
    __device__ __forceinline__ static void many(To* to, const From* from) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
    __device__ __forceinline__ static void one(To* to, const From* from) { *to = *from; }
};

template <class Target, class Source>
struct Convert {
    using To = Target;
    using From = Source;
    static constexpr int pack = 4;
    __device__ __forceinline__ static void many(To* to, const From* from) {
        float values[pack];
        load_floats(from, values);
        store_floats(to, values);
    }
    __device__ __forceinline__ static void one(To* to, const From* from) {
        float value;
        load(from, value);
        store(to, value);
    }
};

template <class Move>
__global__ void __launch_bounds__(kBlockThreads) flatten_kernel(const __grid_constant__ FlattenBatch batch) {
    const Copy& copy = batch.copies[find_copy(batch.copies, batch.num_copies, blockIdx.x)];
    const int64_t begin = (blockIdx.x - copy.first) * kChunkNumel, left = copy.numel - begin;
    const int numel = static_cast<int>(left < kChunkNumel ? left : kChunkNumel);
    auto* const to = static_cast<typename Move::To*>(copy.to) + begin;
    auto* const from = static_cast<const typename Move::From*>(copy.from) + begin;
    const int lead = elements_to_boundary<Move::pack>(to);
    const bool together = elements_to_boundary<Move::pack>(from) == lead;
    for_each_pack<Move::pack>(
        numel, together ? lead : -1, threadIdx.x, [=](int i) { Move::many(to + i, from + i); },
        [=](int i) { Move::one(to + i, from + i); });
}

// units: how many of Move's elements make one of the copy's.
template <class Move>
const char* copy_all(const FlattenArgs& args, int64_t units, cudaStream_t stream) {
    FlattenBatch batch;
    for (int64_t first = 0; first < args.num_copies; first += kCapacity) {
        int64_t chunks = 0;
        batch.num_copies = args.num_copies - first < kCapacity ? args.num_copies - first : kCapacity;
        for (int64_t i = 0; i < batch.num_copies; ++i) {
            const Copy& copy = args.copies[first + i];
            batch.copies[i] = {copy.to, copy.from, copy.numel * units, chunks};
            chunks += num_chunks(copy.numel * units);
        }
        if (chunks == 0) continue;
        flatten_kernel<Move><<<static_cast<unsigned>(chunks), kBlockThreads, 0, stream>>>(batch);
        if (const char* text = error_text(cudaGetLastError())) return text;
    }
    return nullptr;
}

template <class Unit>
const char* copy_units(const FlattenArgs& args, cudaStream_t stream) {
    return copy_all<CopyUnits<Unit>>(args, args.raw_size / static_cast<int64_t>(sizeof(Unit)), stream);
}

template <class To, class One, class Other>
const char* convert_from(DType one, const FlattenArgs& args, cudaStream_t stream) {
    if (args.from_dtype == one) return copy_all<Convert<To, One>>(args, 1, stream);
    return copy_all<Convert<To, Other>>(args, 1, stream);
}

}  // namespace

const char* launch_flatten(const FlattenArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.raw_size == 1) return copy_units<uint8_t>(args, stream);
    if (args.raw_size == 2) return copy_units<uint16_t>(args, stream);
    if (args.raw_size == 4) return copy_units<uint32_t>(args, stream);
    if (args.raw_size != 0) return copy_units<uint64_t>(args, stream);
    if (args.to_dtype == DType::f32) return convert_from<float, bf16, f16>(DType::bf16, args, stream);
    if (args.to_dtype == DType::bf16) return convert_from<bf16, float, f16>(DType::f32, args, stream);
    return convert_from<f16, float, bf16>(DType::f32, args, stream);
}

}  // namespace deepcore
