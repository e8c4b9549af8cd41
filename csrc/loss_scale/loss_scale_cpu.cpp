// Owns the CPU kernel of the loss_scale stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: there are three numbers.
#include "loss_scale/loss_scale_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

void loss_scale_update(const LossScaleArgs& args) noexcept { advance_loss_scale(args); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
