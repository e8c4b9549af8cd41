// Owns the walk over pieces and blocks.
// Knows nothing of how files were opened.
#include "host/block_file.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>
#include <cerrno>
#include <cstring>

#include <algorithm>
#include <thread>

#include "host/crc32c.h"
#include "host/stream_copy.h"

namespace deepcore {

namespace {

// Bytes of one system call. What was read is summed while it is in a core's cache; a write costs the kernel less the
// more it gets at once, and is summed before.
constexpr int64_t kRead = 256 << 10, kWrite = 1 << 20;
constexpr int kVectors = 64;  // pieces of one system call

// Gives the bytes of pieces in runs, from any place on.
class Walk {
  public:
    Walk(const std::vector<Piece>& pieces, int64_t begin, char* scratch) : pieces_(pieces), scratch_(scratch) {
        while (index_ < pieces_.size() && begin >= pieces_[index_].nbytes) begin -= pieces_[index_++].nbytes;
        inside_ = begin;
    }

    // Up to `limit` bytes, as vectors; returns their number. The scratch has room for as many.
    int take(int64_t limit, iovec* vectors) {
        int count = 0;
        char* spare = scratch_;
        for (; limit > 0 && count < kVectors && index_ < pieces_.size();) {
            const Piece& piece = pieces_[index_];
            const int64_t nbytes = std::min(limit, piece.nbytes - inside_);
            if (nbytes > 0) {
                char* memory = piece.memory != nullptr ? piece.memory + inside_ : spare;
                if (piece.memory == nullptr) spare += nbytes;
                vectors[count++] = {memory, static_cast<size_t>(nbytes)};
            }
            limit -= nbytes;
            inside_ += nbytes;
            if (inside_ == piece.nbytes) {
                ++index_;
                inside_ = 0;
            }
        }
        return count;
    }

  private:
    const std::vector<Piece>& pieces_;
    char* scratch_;
    size_t index_ = 0;
    int64_t inside_ = 0;
};

int64_t total_of(const iovec* vectors, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += static_cast<int64_t>(vectors[i].iov_len);
    return total;
}

// All of the vectors; a system call may do less than it was asked for.
Failure transfer(bool writes, int file, const iovec* vectors, int count, int64_t offset) {
    iovec rest[kVectors];
    std::copy(vectors, vectors + count, rest);
    iovec* first = rest;
    while (count > 0) {
        const ssize_t moved = writes ? pwritev(file, first, count, offset) : preadv(file, first, count, offset);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return {errno, offset, 0};
        if (moved == 0) return {writes ? EIO : 0, offset, total_of(first, count)};
        offset += moved;
        size_t left = static_cast<size_t>(moved);
        while (count > 0 && left >= first->iov_len) {
            left -= first->iov_len;
            ++first;
            --count;
        }
        if (count > 0) {
            first->iov_base = static_cast<char*>(first->iov_base) + left;
            first->iov_len -= left;
        }
    }
    return {};
}

uint32_t sum_of(uint32_t crc, const iovec* vectors, int count) {
    for (int i = 0; i < count; ++i) crc = crc32c(crc, vectors[i].iov_base, static_cast<int64_t>(vectors[i].iov_len));
    return crc;
}

int64_t nbytes_of(const std::vector<Piece>& pieces) {
    int64_t total = 0;
    for (const Piece& piece : pieces) total += piece.nbytes;
    return total;
}

// Blocks [first, last) of a read; `offset` is that of block 0.
Verdict read_some(int file, int64_t offset, const std::vector<Piece>& pieces, int64_t block, const uint32_t* expected,
                  int64_t first, int64_t last) {
    const int64_t total = nbytes_of(pieces);
    std::vector<char> scratch(kRead);
    Walk walk(pieces, first * block, scratch.data());
    iovec vectors[kVectors];
    for (int64_t index = first; index < last; ++index) {
        const int64_t end = std::min(total, (index + 1) * block);
        uint32_t crc = 0;
        for (int64_t at = index * block; at < end;) {
            const int count = walk.take(std::min(end - at, kRead), vectors);
            const Failure failure = transfer(false, file, vectors, count, offset + at);
            if (failure.code != 0 || failure.missing != 0) return {failure, -1, 0};
            if (expected != nullptr) crc = sum_of(crc, vectors, count);
            at += total_of(vectors, count);
        }
        if (expected != nullptr && crc != expected[index]) return {{}, index, crc};
    }
    return {};
}

// Every part in a thread of its own, the first one in the caller's.
template <class Work>
void in_parts(int64_t parts, const Work& work) {
    std::vector<std::thread> helpers;
    for (int64_t part = 1; part < parts; ++part) helpers.emplace_back(work, part);
    work(0);
    for (std::thread& helper : helpers) helper.join();
}

// Bytes [begin, end) of the pieces.
void copy_some(const std::vector<Piece>& pieces, char* memory, int64_t begin, int64_t end) {
    int64_t at = 0;
    for (const Piece& piece : pieces) {
        const int64_t low = std::max(begin, at), high = std::min(end, at + piece.nbytes);
        if (low < high) stream_copy(memory + low, piece.memory + (low - at), high - low);
        at += piece.nbytes;
    }
}

}  // namespace

void gather(const std::vector<Piece>& pieces, char* memory, int threads) {
    constexpr int64_t kLeast = 4 << 20;  // bytes that are worth a thread
    const int64_t total = nbytes_of(pieces);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total / kLeast));
    in_parts(parts, [&](int64_t part) { copy_some(pieces, memory, total * part / parts, total * (part + 1) / parts); });
}

int reserve(int file, int64_t nbytes) {
#if defined(__linux__)
    while (nbytes > 0 && fallocate(file, 0, 0, nbytes) != 0) {
        if (errno == EINTR) continue;
        const bool no_room = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
        return no_room ? errno : 0;  // whatever else is wrong, if anything, the write will say
    }
#endif
    return 0;
}

Failure write_blocks(int file, int64_t offset, const std::vector<Piece>& pieces, int64_t block, uint32_t* sums) {
    const int64_t total = nbytes_of(pieces);
    Walk walk(pieces, 0, nullptr);
    iovec vectors[kVectors];
    for (int64_t begin = 0; begin < total; begin += block) {
        const int64_t end = std::min(total, begin + block);
        uint32_t crc = 0;
        for (int64_t at = begin; at < end;) {
            const int count = walk.take(std::min(end - at, kWrite), vectors);
            crc = sum_of(crc, vectors, count);
            const Failure failure = transfer(true, file, vectors, count, offset + at);
            if (failure.code != 0) return failure;
            at += total_of(vectors, count);
        }
        sums[begin / block] = crc;
    }
    return {};
}

Verdict read_blocks(int file, int64_t offset, const std::vector<Piece>& pieces, int64_t block, const uint32_t* expected,
                    int threads) {
    const int64_t num_blocks = (nbytes_of(pieces) + block - 1) / block;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, num_blocks / 8));
    std::vector<Verdict> verdicts(parts);
    in_parts(parts, [&](int64_t part) {
        verdicts[part] = read_some(file, offset, pieces, block, expected, num_blocks * part / parts,
                                   num_blocks * (part + 1) / parts);
    });
    for (const Verdict& verdict : verdicts) {
        if (verdict.failure.code != 0 || verdict.failure.missing != 0 || verdict.bad_block >= 0) return verdict;
    }
    return {};
}

}  // namespace deepcore
