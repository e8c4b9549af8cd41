// Owns the CRC-32C of a run of bytes: eight tables anywhere, three interleaved chains of an instruction where there is
// one. Knows nothing of files.
//
// A CRC is linear over GF(2): that of A followed by B is that of A, advanced over as many zero bytes as B has, xor that
// of B begun at 0. So a run is cut into three, whose instructions, which wait for nothing but their own predecessors,
// fill the processor's pipeline; the parts are then advanced by tables and added.
#include "host/crc32c.h"

#include <array>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace deepcore {

namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;   // reflected
constexpr int64_t kLine = 64;                  // bytes that memory gives at once
constexpr int64_t kLong = 8192, kShort = 256;  // bytes of one of three interleaved parts; multiples of kLine

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// Row k: the register after a byte and k zero bytes.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
        tables[0][byte] = value;
    }
    for (int row = 1; row < 8; ++row) {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            const uint32_t before = tables[row - 1][byte];
            tables[row][byte] = (before >> 8) ^ tables[0][before & 255];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

inline uint32_t word(const unsigned char* p) {
    return p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

uint32_t bytes_from_tables(uint32_t state, const unsigned char* p, int64_t nbytes) {
    for (; nbytes >= 8; p += 8, nbytes -= 8) {
        const uint32_t low = word(p) ^ state, high = word(p + 4);
        state = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^
                kTables[4][low >> 24] ^ kTables[3][high & 255] ^ kTables[2][high >> 8 & 255] ^
                kTables[1][high >> 16 & 255] ^ kTables[0][high >> 24];
    }
    for (; nbytes > 0; ++p, --nbytes) state = (state >> 8) ^ kTables[0][(state ^ *p) & 255];
    return state;
}

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))
#define DEEPCORE_CRC_INSTRUCTION 1

// Assembly, and not an intrinsic: this file is compiled for every processor of the family, the choice is made at run
// time.
inline uint64_t step(uint64_t state, const unsigned char* p) {
    uint64_t data;
    __builtin_memcpy(&data, p, 8);
#if defined(__x86_64__)
    __asm__("crc32q %1, %0" : "+r"(state) : "rm"(data));
#else
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %1" : "+r"(state) : "r"(data));
#endif
    return state;
}

bool has_instruction() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    constexpr unsigned long kCrc32 = 1 << 7;  // HWCAP_CRC32
    return (getauxval(AT_HWCAP) & kCrc32) != 0;
#endif
}

const char* name_of_instruction() {
#if defined(__x86_64__)
    return "sse4.2";
#else
    return "armv8";
#endif
}

// Advances a register over a fixed number of zero bytes.
class Advance {
  public:
    explicit Advance(int64_t nbytes) {
        static const unsigned char zeros[8] = {};
        std::array<uint32_t, 32> of_bit{};
        for (int bit = 0; bit < 32; ++bit) {
            uint64_t state = uint64_t{1} << bit;
            for (int64_t at = 0; at < nbytes; at += 8) state = step(state, zeros);
            of_bit[bit] = static_cast<uint32_t>(state);
        }
        for (int row = 0; row < 4; ++row) {
            for (int byte = 0; byte < 256; ++byte) {
                uint32_t value = 0;
                for (int bit = 0; bit < 8; ++bit) value ^= byte >> bit & 1 ? of_bit[8 * row + bit] : 0;
                rows_[row][byte] = value;
            }
        }
    }

    uint32_t operator()(uint32_t state) const {
        return rows_[0][state & 255] ^ rows_[1][state >> 8 & 255] ^ rows_[2][state >> 16 & 255] ^ rows_[3][state >> 24];
    }

  private:
    std::array<std::array<uint32_t, 256>, 4> rows_;
};

uint32_t three(uint32_t state, const unsigned char* p, int64_t part, const Advance& advance) {
    uint64_t first = state, second = 0, third = 0;
    for (int64_t line = 0; line < part; line += kLine) {
        const unsigned char* ahead = p + 3 * part + line;  // of the next three parts; beyond the end it does no harm
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + part);
        __builtin_prefetch(ahead + 2 * part);
        for (int64_t at = line; at < line + kLine; at += 8) {
            first = step(first, p + at);
            second = step(second, p + part + at);
            third = step(third, p + 2 * part + at);
        }
    }
    const uint32_t both = advance(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
    return advance(both) ^ static_cast<uint32_t>(third);
}

uint32_t bytes_by_instruction(uint32_t state, const unsigned char* p, int64_t nbytes) {
    static const Advance over_long(kLong), over_short(kShort);
    for (; nbytes >= 3 * kLong; p += 3 * kLong, nbytes -= 3 * kLong) state = three(state, p, kLong, over_long);
    for (; nbytes >= 3 * kShort; p += 3 * kShort, nbytes -= 3 * kShort) state = three(state, p, kShort, over_short);
    uint64_t rest = state;
    for (; nbytes >= 8; p += 8, nbytes -= 8) rest = step(rest, p);
    return bytes_from_tables(static_cast<uint32_t>(rest), p, nbytes);
}

#endif

}  // namespace

uint32_t crc32c_from_tables(uint32_t crc, const void* data, int64_t nbytes) {
    return ~bytes_from_tables(~crc, static_cast<const unsigned char*>(data), nbytes);
}

uint32_t crc32c(uint32_t crc, const void* data, int64_t nbytes) {
#ifdef DEEPCORE_CRC_INSTRUCTION
    static const bool there = has_instruction();
    if (there) return ~bytes_by_instruction(~crc, static_cast<const unsigned char*>(data), nbytes);
#endif
    return crc32c_from_tables(crc, data, nbytes);
}

const char* crc32c_way() {
#ifdef DEEPCORE_CRC_INSTRUCTION
    if (has_instruction()) return name_of_instruction();
#endif
    return "tables";
}

}  // namespace deepcore
