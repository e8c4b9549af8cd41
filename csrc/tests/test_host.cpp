// Owns the check of the checkpoint's checksum and of the transfers that take it.
// Knows nothing of Python.
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "host/block_file.h"
#include "host/crc32c.h"

using namespace deepcore;

namespace {

std::vector<char> noise(int64_t nbytes) {
    deepcore_test::Random random;
    std::vector<char> bytes(nbytes);
    for (char& byte : bytes) byte = static_cast<char>(random.bits());
    return bytes;
}

// RFC 3720, B.4, and the check value of the catalogue of CRCs.
void known_values() {
    const std::vector<char> zeros(32, 0), ones(32, static_cast<char>(255));
    std::vector<char> rising(32);
    for (int i = 0; i < 32; ++i) rising[i] = static_cast<char>(i);
    for (auto sum : {crc32c, crc32c_from_tables}) {
        CHECK(sum(0, "123456789", 9) == 0xe3069283);
        CHECK(sum(0, zeros.data(), 32) == 0x8a9136aa);
        CHECK(sum(0, ones.data(), 32) == 0x62a8ab43);
        CHECK(sum(0, rising.data(), 32) == 0x46dd794e);
        CHECK(sum(7, "", 0) == 7);
    }
    printf("crc32c: %s\n", crc32c_way());
}

void the_instruction_agrees_with_the_tables() {
    const std::vector<char> bytes = noise(200'000);
    deepcore_test::Random random;
    for (int64_t nbytes : {0, 1, 7, 8, 31, 767, 768, 769, 24575, 24576, 24577, 100'000, 199'990}) {
        for (int start : {0, 1, 5}) {
            const uint32_t before = random.bits(), whole = crc32c(before, bytes.data() + start, nbytes);
            CHECK(whole == crc32c_from_tables(before, bytes.data() + start, nbytes));
            const int64_t cut = nbytes / 3;
            const uint32_t part = crc32c(before, bytes.data() + start, cut);
            CHECK(whole == crc32c(part, bytes.data() + start + cut, nbytes - cut));
        }
    }
}

// Cut into pieces of all sizes, many of them empty or of one byte.
std::vector<Piece> cut(std::vector<char>& bytes, bool gaps) {
    deepcore_test::Random random;
    random.state = 77;
    std::vector<Piece> pieces;
    for (int64_t at = 0; at < static_cast<int64_t>(bytes.size());) {
        int64_t nbytes = random.below(8) < 6 ? random.below(3) : random.below(300'000);
        nbytes = std::min<int64_t>(nbytes, bytes.size() - at);
        const bool wanted = !gaps || random.below(3) > 0;
        pieces.push_back({wanted ? bytes.data() + at : nullptr, nbytes});
        at += nbytes;
    }
    return pieces;
}

void blocks_come_back(int threads) {
    constexpr int64_t kBlock = 65536, kOffset = 4096, kBytes = 5'000'001;
    std::vector<char> bytes = noise(kBytes), found(kBytes, 1);
    std::vector<uint32_t> sums((kBytes + kBlock - 1) / kBlock);
    FILE* stream = tmpfile();
    const int file = fileno(stream);
    CHECK(write_blocks(file, kOffset, cut(bytes, false), kBlock, sums.data()).code == 0);
    for (size_t i = 0; i < sums.size(); ++i) {
        const int64_t nbytes = std::min<int64_t>(kBlock, kBytes - i * kBlock);
        CHECK(sums[i] == crc32c_from_tables(0, bytes.data() + i * kBlock, nbytes));
    }
    CHECK(read_blocks(file, kOffset, cut(found, false), kBlock, sums.data(), threads).bad_block == -1);
    CHECK(found == bytes);
    std::vector<char> sparse(kBytes, 1);
    const std::vector<Piece> wanted = cut(sparse, true);
    CHECK(read_blocks(file, kOffset, wanted, kBlock, sums.data(), threads).bad_block == -1);
    int64_t at = 0;
    for (const Piece& piece : wanted) {
        for (int64_t i = at; i < at + piece.nbytes; ++i) CHECK(sparse[i] == (piece.memory != nullptr ? bytes[i] : 1));
        at += piece.nbytes;
    }
    const char other = static_cast<char>(bytes[40 * kBlock + 5] ^ 4);
    CHECK(pwrite(file, &other, 1, kOffset + 40 * kBlock + 5) == 1);
    CHECK(read_blocks(file, kOffset, wanted, kBlock, sums.data(), threads).bad_block == 40);
    CHECK(read_blocks(file, kOffset, wanted, kBlock, nullptr, threads).bad_block == -1);
    CHECK(ftruncate(file, kOffset + kBytes - 10) == 0);
    const Verdict verdict = read_blocks(file, kOffset, cut(found, false), kBlock, nullptr, threads);
    CHECK(verdict.failure.code == 0);
    CHECK(verdict.failure.missing > 0);
    CHECK(reserve(file, int64_t{1} << 62) != 0);  // nothing has as much
    fclose(stream);
    CHECK(reserve(-1, 100) == 0);  // the write will say
    CHECK(write_blocks(-1, 0, cut(bytes, false), kBlock, sums.data()).code != 0);
}

void pieces_are_copied() {
    std::vector<char> bytes = noise(40'000'001), found(bytes.size());
    for (int threads : {1, 3}) {
        std::fill(found.begin(), found.end(), 0);
        gather(cut(bytes, false), found.data(), threads);
        CHECK(found == bytes);
    }
}

}  // namespace

int main() {
    known_values();
    pieces_are_copied();
    the_instruction_agrees_with_the_tables();
    for (int threads : {1, 3}) blocks_come_back(threads);
    return deepcore_test::result();
}
