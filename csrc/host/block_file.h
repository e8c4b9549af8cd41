// Owns transfers between memory in pieces and a file in blocks, each block with its CRC-32C, taken while it is in
// cache. Knows nothing of Python or of what the bytes mean.
#pragma once

#include <cstdint>
#include <vector>

#include "host/file_engine.h"

namespace deepcore {

struct Piece {
    char* memory;  // null when reading: nobody wants these bytes, they are only checked
    int64_t nbytes;
};

struct Verdict {
    Failure failure;
    int64_t bad_block = -1;  // the first whose checksum is `found` and not what was expected
    uint32_t found = 0;
};

// The pieces, one after the other, are copied to `memory`, by several threads.
void gather(const std::vector<Piece>& pieces, char* memory, int threads);

// Take space for the bytes of a file that is written next, in one piece where there is one: a write that has to find
// its own as it goes takes a fifth longer. Returns 0, or the errno of a file that will not fit.
int reserve(int file, int64_t nbytes);

// The pieces, one after the other, become the file from byte `offset` on. sums: one per block of what is written.
Failure write_blocks(int file, int64_t offset, const std::vector<Piece>& pieces, int64_t block, uint32_t* sums);

// The other way, by several threads. expected: one per block, or null where nothing is to be checked.
Verdict read_blocks(int file, int64_t offset, const std::vector<Piece>& pieces, int64_t block, const uint32_t* expected,
                    int threads);

}  // namespace deepcore
