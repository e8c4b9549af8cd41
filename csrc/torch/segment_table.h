// Owns the checks of a segment table and of chunk_offsets.
// Knows nothing of what the segments are used for; core/segments.h says what the columns mean.
#pragma once

#include "core/segments.h"
#include "torch/lists.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct SegmentTable {
    const Segment* rows;
    int64_t num_rows;
    const int64_t* chunk_offsets;  // on the host
    int64_t num_chunks;
};

inline void require_row(const Segment& row, int64_t index, int64_t num_hyper_rows, const CheckedList& tensors) {
    const auto at = static_cast<long long>(index);
    if (row.tensor < 0 || row.tensor >= static_cast<int64_t>(tensors.size())) {
        fail("segments[%lld]: got tensor %lld, expected one of %zu", at, (long long)row.tensor, tensors.size());
    }
    const int64_t numel = tensors[row.tensor].numel;
    if (row.begin < 0 || row.numel < 0 || row.begin > numel || row.numel > numel - row.begin) {
        fail("segments[%lld]: got begin %lld and numel %lld, expected a range inside tensor %lld of %lld elements", at,
             (long long)row.begin, (long long)row.numel, (long long)row.tensor, (long long)numel);
    }
    if (num_hyper_rows >= 0 && (row.hyper < 0 || row.hyper >= num_hyper_rows)) {
        fail("segments[%lld]: got hyperparameter row %lld, expected one of %lld", at, (long long)row.hyper,
             (long long)num_hyper_rows);
    }
}

inline void require_offset(const SegmentTable& table, int64_t tensor, int64_t chunks) {
    if (table.chunk_offsets[tensor] != chunks) {
        fail("chunk_offsets[%lld]: got %lld, expected %lld, the chunks of all segments before that tensor",
             (long long)tensor, (long long)table.chunk_offsets[tensor], (long long)chunks);
    }
}

// Every row and every offset; only where the table can be read here.
inline void require_rows(const SegmentTable& table, int64_t num_hyper_rows, const CheckedList& tensors) {
    int64_t chunks = 0, tensor = 0, covered = 0;
    for (int64_t i = 0; i < table.num_rows; ++i) {
        const Segment& row = table.rows[i];
        require_row(row, i, num_hyper_rows, tensors);
        if (row.tensor < tensor) {
            fail("segments[%lld]: got tensor %lld after %lld, expected rows sorted by tensor", (long long)i,
                 (long long)row.tensor, (long long)tensor);
        }
        if (row.tensor > tensor) covered = 0;
        if (row.numel > 0 && row.begin < covered) {
            fail("segments[%lld]: got begin %lld, expected at least %lld, where the segment before it ends",
                 (long long)i, (long long)row.begin, (long long)covered);
        }
        if (row.first_chunk != chunks) {
            fail("segments[%lld]: got first chunk %lld, expected %lld", (long long)i, (long long)row.first_chunk,
                 (long long)chunks);
        }
        for (; tensor < row.tensor; ++tensor) require_offset(table, tensor + 1, chunks);
        chunks += num_chunks(row.numel);
        if (row.numel > 0) covered = row.begin + row.numel;
    }
    for (; tensor < static_cast<int64_t>(tensors.size()); ++tensor) require_offset(table, tensor + 1, chunks);
}

// num_hyper_rows: -1 where the op has no hyperparameters.
inline SegmentTable segment_table(const Tensor& segments, const Tensor& chunk_offsets, int64_t num_hyper_rows,
                                  const CheckedList& tensors, Device device) {
    const int64_t num_tensors = static_cast<int64_t>(tensors.size());
    const int64_t num_rows = segments.dim() == 2 ? segments.sizes()[0] : 0;
    SegmentTable table;
    table.rows = table_of<const Segment>("segments", segments, ScalarType::Long, {num_rows, 5}, device);
    table.num_rows = num_rows;
    table.chunk_offsets =
        table_of<const int64_t>("chunk_offsets", chunk_offsets, ScalarType::Long, {num_tensors + 1}, cpu_device());
    table.num_chunks = table.chunk_offsets[num_tensors];
    require_offset(table, 0, 0);
    for (int64_t i = 0; i < num_tensors; ++i) {
        if (table.chunk_offsets[i] > table.chunk_offsets[i + 1]) {
            fail("chunk_offsets[%lld]: got %lld after %lld, expected no decrease", (long long)(i + 1),
                 (long long)table.chunk_offsets[i + 1], (long long)table.chunk_offsets[i]);
        }
    }
    if (table.num_chunks > 0 && num_rows == 0)
        fail("segments: got no rows for %lld chunks", (long long)table.num_chunks);
    if (device.is_cpu()) require_rows(table, num_hyper_rows, tensors);
    return table;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
