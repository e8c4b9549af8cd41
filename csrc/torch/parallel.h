// Owns the way from a binding to torch's own thread pool, so that torch.set_num_threads is honoured.
// Knows nothing of the work.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include "core/segments.h"
#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// work(begin, end) over [0, total), in pieces of at least `grain`. work must not throw.
template <class Work>
void parallel_for(int64_t total, int64_t grain, const Work& work) {
    if (total <= grain) {
        work(0, total);
        return;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Work*>(context))(begin, end);
    };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, total, grain, call, const_cast<Work*>(&work)));
}

// As above over all chunks of the segments in `args`, of which those that are small go to a thread in one piece with
// others: `grain` elements at least.
template <class Args, class Work>
void parallel_chunks(const Args& args, int64_t num_chunks, int64_t grain, const Work& work) {
    int64_t numel = 0;
    for (int64_t i = 0; i < args.num_segments; ++i) numel += args.segments[i].numel;
    const int64_t chunks = numel > 0 ? (grain * num_chunks + numel / 2) / numel : 1;
    parallel_for(num_chunks, chunks > 1 ? chunks : 1, work);
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
