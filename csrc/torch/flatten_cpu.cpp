// Owns the CPU bindings of flatten_ and unflatten_: checks, starts the kernel on torch's threads.
// Knows nothing of how elements are copied.
#include "torch/direct.h"
#include "torch/flatten_args.h"
#include "torch/isa.h"
#include "torch/parallel.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

constexpr int64_t kFlattenGrain = 32768;             // elements that are worth a thread
constexpr int64_t kFlattenStreamingNumel = 1 << 22;  // beyond this the caches would only hold what nobody reads soon

void start(FlattenCall call) {
    call.args.streaming = call.numel >= kFlattenStreamingNumel;
    const auto copy = DEEPCORE_PICK(flatten_range);
    parallel_for(call.numel, kFlattenGrain, [&](int64_t begin, int64_t end) { copy(call.args, begin, end); });
}

void flatten_(const Tensor& flat, const TensorList& tensors, const Tensor& starts) {
    start(flatten_call(flat, tensors, starts, Direction::flatten, cpu_device()));
}

void unflatten_(const TensorList& tensors, const Tensor& flat, const Tensor& starts) {
    start(flatten_call(flat, tensors, starts, Direction::unflatten, cpu_device()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) {
    serve<&flatten_>(m, "flatten_");
    serve<&unflatten_>(m, "unflatten_");
}
