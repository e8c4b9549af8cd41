// Owns the CPU kernels of the muon stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "core/update_cpu.h"
#include "muon/muon_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

void muon_momentum_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<MuonMomentum>(args, begin, end);
}

void muon_momentum_chunks(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    apply_range<MuonMomentum>(args, begin, end);
}

void muon_apply_prepare(const MuonApplyArgs& args, int64_t begin, int64_t end) noexcept {
    for (int64_t index = begin; index < end; ++index) prepare_muon_apply(args, index);
}

void muon_apply_chunks(const MuonApplyArgs& args, int64_t begin, int64_t end) noexcept {
    apply_range<MuonApply>(args, begin, end);
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
