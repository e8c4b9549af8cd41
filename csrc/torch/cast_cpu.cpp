// Owns the CPU binding of cast_: checks, starts the kernel on torch's threads.
// Knows nothing of rounding.
#include "torch/cast_args.h"
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

constexpr int64_t kCastGrain = 32768 / kCastBlock;  // blocks of elements that are worth a thread
constexpr int64_t kCastStreamingNumel = 1 << 22;    // beyond this the caches would only hold what nobody reads soon

void cast_(const Tensor& out, const Tensor& source, const OptionalTensor& seed) {
    CastArgs args = cast_args(out, source, seed, cpu_device());
    args.streaming = args.numel >= kCastStreamingNumel;
    const auto cast = DEEPCORE_PICK(cast_range);
    parallel_for((args.numel + kCastBlock - 1) / kCastBlock, kCastGrain, [&](int64_t begin, int64_t end) {
        cast(args, begin * kCastBlock, end * kCastBlock < args.numel ? end * kCastBlock : args.numel);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&cast_>(m, "cast_"); }
