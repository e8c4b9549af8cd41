// Owns the CPU bindings of adam_ and adam_stochastic_: checks, starts the kernels on torch's threads.
// Knows nothing of the formula.
#include "adam/adam_math.h"
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/parallel.h"
#include "torch/update_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void require_largest(const UpdateArgs& args) {
    for (int64_t i = 0; i < args.num_segments && args.num_states < Adam::kStates; ++i) {
        if (args.hyper[args.segments[i].hyper * Adam::kColumns + Adam::kAmsgrad] == 0) continue;
        fail("max_exp_avg_sqs: got no tensors, expected %lld, since segments[%lld] asks for AMSGrad",
             (long long)args.num_tensors, (long long)i);
    }
}

template <class Prepare, class Apply>
void update(const UpdateCall& call, Prepare prepare, Apply apply) {
    require_largest(call.args);
    prepare(call.args, 0, call.args.num_segments);
    parallel_chunks(call.args, call.num_chunks, kChunkNumel,
                    [&](int64_t begin, int64_t end) { apply(call.args, begin, end); });
}

void adam_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& max_exp_avg_sqs, const TensorList& copies, const Tensor& segments,
           const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
           const Tensor& grad_scale, const Tensor& skip) {
    const std::vector<NamedList> states = {
        {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs, true}};
    update(update_call({params, &grads, copies, states, true},
                       {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip}, Adam::kColumns,
                       sizeof(AdamScalars), cpu_device()),
           DEEPCORE_PICK(adam_prepare), DEEPCORE_PICK(adam_apply));
}

void adam_stochastic_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const Tensor& segments,
                      const Tensor& chunk_offsets, const Tensor& hyper, const Tensor& steps, const Tensor& active,
                      const Tensor& grad_scale, const Tensor& skip, const Tensor& origins, const Tensor& seed) {
    const std::vector<NamedList> states = {
        {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs, true}};
    update(update_call({params, &grads, kNoTensors, states, true},
                       {segments, chunk_offsets, hyper, steps, active, &grad_scale, skip, &origins, &seed},
                       Adam::kColumns, sizeof(StochasticAdamScalars), cpu_device()),
           DEEPCORE_PICK(adam_stochastic_prepare), DEEPCORE_PICK(adam_stochastic_apply));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) {
    serve<&adam_>(m, "adam_");
    serve<&adam_stochastic_>(m, "adam_stochastic_");
}
