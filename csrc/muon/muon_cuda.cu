// Owns the CUDA kernels of the muon stem and their launchers.
// Knows nothing of tensors.
#include "core/update.cuh"
#include "muon/muon_math.h"

namespace deepcore {
namespace {

__global__ void __launch_bounds__(kBlockThreads) muon_apply_prepare_kernel(MuonApplyArgs args) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
    if (index < args.num_segments) prepare_muon_apply(args, index);
}

}  // namespace

const char* launch_muon_momentum(const UpdateArgs& args, void* stream) noexcept {
    return launch_update<MuonMomentum>(args, stream);
}

const char* launch_muon_apply(const MuonApplyArgs& args, void* stream_pointer) noexcept {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (args.num_segments == 0) return nullptr;
    const auto blocks = static_cast<unsigned>((args.num_segments + kBlockThreads - 1) / kBlockThreads);
    muon_apply_prepare_kernel<<<blocks, kBlockThreads, 0, stream>>>(args);
    if (const char* text = error_text(cudaGetLastError())) return text;
    return launch_apply<MuonApply>(args, stream);
}

}  // namespace deepcore
