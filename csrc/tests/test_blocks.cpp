// Owns the check of chunk and block arithmetic: every element visited once, aligned where it must be.
// Knows nothing of kernels. It plays all threads of a CUDA block, one after the other.
#include <vector>

#include "check.h"
#include "core/blocks.h"

using namespace deepcore;

namespace {

std::vector<Segment> random_table(deepcore_test::Random& random, int rows) {
    std::vector<Segment> table;
    int64_t chunks = 0;
    for (int i = 0; i < rows; ++i) {
        const int64_t sizes[] = {0, 1, kChunkNumel - 1, kChunkNumel, kChunkNumel + 1, 5 * kChunkNumel, 100};
        table.push_back({i, random.below(10), sizes[random.below(7)], 0, chunks});
        chunks += num_chunks(table.back().numel);
    }
    return table;
}

int64_t owner(const std::vector<Segment>& table, int64_t chunk) {
    for (size_t row = 0; row < table.size(); ++row) {
        if (chunk >= table[row].first_chunk && chunk < table[row].first_chunk + num_chunks(table[row].numel)) {
            return static_cast<int64_t>(row);
        }
    }
    return -1;
}

void both_searches_find_the_owner() {
    deepcore_test::Random random;
    for (int rows : {1, 2, 3, 10, 255, 256, 257, 700, 66000}) {
        const std::vector<Segment> table = random_table(random, rows);
        const int64_t chunks = table.back().first_chunk + num_chunks(table.back().numel);
        const int64_t stride = rows > 1000 ? 997 : 1;
        for (int64_t chunk = 0; chunk < chunks; chunk += stride) {
            const int64_t row = owner(table, chunk);
            int barriers = 0;
            const auto count = [&](auto test) {
                int held = 0;
                ++barriers;
                for (int thread = 0; thread < kBlockThreads; ++thread) held += test(thread);
                return held;
            };
            CHECK(find_segment(table.data(), rows, chunk) == row);
            CHECK(find_segment_in_block(table.data(), rows, chunk, count) == row);
            CHECK(barriers <= (rows == 1 ? 0 : rows <= 256 ? 1 : rows <= 65536 ? 2 : 3));
        }
    }
}

void chunks_cover_each_segment_once() {
    deepcore_test::Random random;
    const std::vector<Segment> table = random_table(random, 40);
    const int64_t chunks = table.back().first_chunk + num_chunks(table.back().numel);
    for (int64_t step : {int64_t{1}, int64_t{3}, chunks}) {
        std::vector<int64_t> next(table.size());
        for (size_t row = 0; row < table.size(); ++row) next[row] = table[row].begin;
        for (int64_t begin = 0; begin < chunks; begin += step) {
            const int64_t end = begin + step < chunks ? begin + step : chunks;
            for_each_chunk(table.data(), 40, begin, end, [&](int64_t row, int64_t, Span span) {
                CHECK(span.begin == next[row]);
                CHECK(span.end > span.begin && span.end - span.begin <= kChunkNumel);
                next[row] = span.end;
            });
        }
        for (size_t row = 0; row < table.size(); ++row) CHECK(next[row] == table[row].begin + table[row].numel);
    }
    for_each_chunk(table.data(), 40, 5, 5, [&](int64_t, int64_t, Span) { CHECK(false); });
}

template <int pack, class T>
void threads_share_a_block(const std::vector<T>& memory, int offset, int numel, bool together) {
    const T* const start = memory.data() + offset;
    const int lead = together ? elements_to_boundary<pack>(start) : -1;
    CHECK(!together || reinterpret_cast<uintptr_t>(start + lead) % (pack * sizeof(T)) == 0);
    std::vector<int> visits(numel);
    int packs = 0;
    for (int thread = 0; thread < kBlockThreads; ++thread) {
        for_each_pack<pack>(
            numel, lead, thread,
            [&](int i) {
                ++packs;
                CHECK(i >= 0 && i + pack <= numel);
                CHECK(reinterpret_cast<uintptr_t>(start + i) % (pack * sizeof(T)) == 0);
                for (int k = 0; k < pack; ++k) ++visits[i + k];
            },
            [&](int i) {
                CHECK(i >= 0 && i < numel);
                ++visits[i];
            });
    }
    for (int i = 0; i < numel; ++i) CHECK(visits[i] == 1);
    CHECK(packs == (together && numel > lead ? (numel - lead) / pack : 0));
}

template <int pack, class T>
void threads_share_every_block() {
    const std::vector<T> memory(kChunkNumel + 64);
    for (int offset = 0; offset < 2 * pack; ++offset) {
        for (int numel : {0, 1, 2, 3, 5, 31, 1000, static_cast<int>(kChunkNumel) - 1, static_cast<int>(kChunkNumel)}) {
            threads_share_a_block<pack>(memory, offset, numel, true);
            threads_share_a_block<pack>(memory, offset, numel, false);
        }
    }
}

}  // namespace

int main() {
    both_searches_find_the_owner();
    chunks_cover_each_segment_once();
    threads_share_every_block<4, float>();
    threads_share_every_block<4, uint16_t>();
    threads_share_every_block<8, uint16_t>();
    threads_share_every_block<16, uint8_t>();
    threads_share_every_block<2, uint64_t>();
    return deepcore_test::result();
}
