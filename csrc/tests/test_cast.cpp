// Owns the check of the cast kernels: every variant gives the bits of the conversions for one element.
// Knows nothing of torch.
#include <math.h>
#include <string.h>

#include <vector>

#include "cast/cast_math.h"
#include "check.h"
#include "variants.h"

using namespace deepcore;

namespace {

constexpr int64_t kNumel = 5003;

std::vector<float> numbers() {
    deepcore_test::Random random;
    std::vector<float> values(kNumel);
    for (float& value : values) value = float_of(random.bits());  // all of them: subnormals, infinities, NaN
    return values;
}

// `out` starts one element into its memory, as a view may.
template <class To>
void variant_rounds_to_nearest(const std::vector<float>& values, DType dtype) {
    for (bool streaming : {false, true}) {
        std::vector<To> out(kNumel + 1), expected(kNumel + 1);
        for (int64_t i = 0; i < kNumel; ++i) store(&expected[i + 1], values[i]);
        const CastArgs args = {dtype, DType::f32, out.data() + 1, values.data(), kNumel, nullptr, streaming};
        DEEPCORE_PICK(cast_range)(args, 0, 2000);
        DEEPCORE_PICK(cast_range)(args, 2000, kNumel);
        CHECK(memcmp(out.data(), expected.data(), out.size() * sizeof(To)) == 0);
    }
}

void variant_rounds_at_random(const std::vector<float>& values) {
    const int64_t seed = -7;
    std::vector<uint16_t> out(kNumel);
    const CastArgs args = {DType::bf16, DType::f32, out.data(), values.data(), kNumel, &seed, false};
    DEEPCORE_PICK(cast_range)(args, 0, 2000);
    DEEPCORE_PICK(cast_range)(args, 2000, kNumel);
    for (int64_t i = 0; i < kNumel; ++i) {
        uint32_t words[4];
        philox(i / 8, 0, static_cast<uint64_t>(seed), words[0], words[1], words[2], words[3]);
        CHECK(out[i] == round_to_bfloat(bits_of(values[i]), words[i % 8 / 2] >> (i % 2 * 16) & 0xffff));
    }
}

// The published vectors of Philox4x32-10: counter and key of zeros, of ones, of the digits of pi.
void philox_is_philox() {
    uint32_t a, b, c, d;
    philox(0, 0, 0, a, b, c, d);
    CHECK(a == 0x6627e8d5 && b == 0xe169c58d && c == 0xbc57ac4c && d == 0x9b00dbd8);
    philox(~0ull, ~0ull, ~0ull, a, b, c, d);
    CHECK(a == 0x408f276d && b == 0x41c83b0e && c == 0xa20bc7c6 && d == 0x6d5451fd);
    philox(0x85a308d3243f6a88, 0x0370734413198a2e, 0x299f31d0a4093822, a, b, c, d);
    CHECK(a == 0xd16cfe09 && b == 0x94fdcceb && c == 0x5001e420 && d == 0x24126ea1);
}

// Four at a time they are the bits of each one's place.
void random_bits_follow_the_place() {
    for (uint64_t place = (uint64_t{1} << 35) - 3; place < (uint64_t{1} << 35) + 20; ++place) {
        const uint64_t bits = random_bits(place, 0x123456789abcdef, 77);
        for (uint64_t k = 0; k < 4; ++k) {
            const uint64_t i = place + k;
            uint32_t words[4];
            philox(i / 8, 0x123456789abcdef, 77, words[0], words[1], words[2], words[3]);
            CHECK((bits >> 16 * k & 0xffff) == (words[i % 8 / 2] >> (i % 2 * 16) & 0xffff));
        }
    }
}

void rounding_is_between_the_neighbours() {
    CHECK(round_to_bfloat(bits_of(1.0f), 0xffff) == 0x3f80);  // exact: stays
    CHECK(round_to_bfloat(bits_of(1.0f) + 1, 0xfffe) == 0x3f80);
    CHECK(round_to_bfloat(bits_of(1.0f) + 1, 0xffff) == 0x3f81);
    CHECK(round_to_bfloat(bits_of(-1.0f) + 1, 0xffff) == 0xbf81);
    CHECK(round_to_bfloat(bits_of(INFINITY), 0xffff) == 0x7f80);
    CHECK(round_to_bfloat(0x7f800001, 0) == 0x7fc0);
}

}  // namespace

int main() {
    philox_is_philox();
    random_bits_follow_the_place();
    rounding_is_between_the_neighbours();
    const std::vector<float> values = numbers();
    const int variants = deepcore_test::for_each_variant([&](const char*) {
        variant_rounds_to_nearest<float>(values, DType::f32);
        variant_rounds_to_nearest<bf16>(values, DType::bf16);
        variant_rounds_to_nearest<f16>(values, DType::f16);
        variant_rounds_at_random(values);
    });
    CHECK(variants > 0);
    return deepcore_test::result();
}
