// Owns the checksum of checkpoint blocks: CRC-32C (Castagnoli, RFC 3720), by the processor's instruction where it has
// one. Knows nothing of files.
#pragma once

#include <cstdint>

namespace deepcore {

// The checksum of what came before, whose own is `crc` (0 at the beginning), followed by these bytes.
uint32_t crc32c(uint32_t crc, const void* data, int64_t nbytes);

// The same from tables alone.
uint32_t crc32c_from_tables(uint32_t crc, const void* data, int64_t nbytes);

// "sse4.2", "armv8" or "tables": what crc32c uses on this processor.
const char* crc32c_way();

}  // namespace deepcore
