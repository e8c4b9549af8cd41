// Owns the check of the scalar conversions against arithmetic in fp64.
// Knows nothing of vectors.
#include <math.h>

#include "check.h"
#include "core/dtype.h"

using namespace deepcore;

namespace {

// The value of a 16-bit pattern with `exponent_bits`, by the definition of the format.
double value_of(unsigned pattern, int exponent_bits) {
    const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = pattern & ((1 << mantissa_bits) - 1);
    const double sign = pattern & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
    const double fraction = exponent ? 1 + ldexp(mantissa, -mantissa_bits) : ldexp(mantissa, -mantissa_bits);
    return sign * ldexp(fraction, (exponent ? exponent : 1) - bias);
}

void widening_is_exact() {
    for (unsigned pattern = 0; pattern < 65536; ++pattern) {
        const auto bits = static_cast<uint16_t>(pattern);
        const f16 half = {bits};
        const bf16 bfloat = {bits};
        float from_half, from_bfloat;
        load(&half, from_half);
        load(&bfloat, from_bfloat);
        const double wide = value_of(pattern, 5), wider = value_of(pattern, 8);
        CHECK(from_half == wide || (isnan(from_half) && isnan(wide)));
        CHECK(from_bfloat == wider || (isnan(from_bfloat) && isnan(wider)));
        CHECK(isnan(wide) || narrow_half(from_half) == bits);
        CHECK(isnan(wider) || narrow_bfloat(from_bfloat) == bits);
    }
}

// Between neighbouring patterns: just below, at and just above the midpoint.
void narrowing_is_to_nearest_even(int exponent_bits, uint16_t (*narrow)(float)) {
    const unsigned infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
    for (unsigned pattern = 0; pattern + 1 < infinity; ++pattern) {
        const double low = value_of(pattern, exponent_bits), high = value_of(pattern + 1, exponent_bits);
        const auto middle = static_cast<float>((low + high) / 2);
        const unsigned even = pattern % 2 ? pattern + 1 : pattern;
        CHECK(narrow(middle) == even);
        CHECK(narrow(-middle) == (even | 0x8000));
        CHECK(narrow(nextafterf(middle, 0)) == (middle == 0 ? even : pattern));
        CHECK(narrow(nextafterf(middle, INFINITY)) == pattern + 1);
    }
    CHECK(narrow(INFINITY) == infinity);
    CHECK(narrow(-INFINITY) == (infinity | 0x8000));
    CHECK((narrow(NAN) & 0x7fff) > infinity);
    CHECK((narrow(-NAN) & 0x7fff) > infinity);
    CHECK(narrow(0x1.fffffep127f) == infinity);
    CHECK(narrow(-0.0f) == 0x8000);
}

}  // namespace

int main() {
    widening_is_exact();
    narrowing_is_to_nearest_even(5, [](float x) { return narrow_half(x); });
    narrowing_is_to_nearest_even(8, [](float x) { return narrow_bfloat(x); });
    CHECK(narrow_half(65519.0f) == 0x7bff);
    CHECK(narrow_half(65520.0f) == 0x7c00);
    return deepcore_test::result();
}
