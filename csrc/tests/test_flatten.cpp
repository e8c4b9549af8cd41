// Owns the check of the flatten kernels: every element arrives, nothing else is touched, in any split of the work.
// Knows nothing of torch.
#include <string.h>

#include <type_traits>
#include <vector>

#include "check.h"
#include "flatten/flatten_math.h"
#include "variants.h"

using namespace deepcore;

namespace {

constexpr int64_t kSizes[] = {0, 1, 31, 0, 1000, 64, 4097, 0};
constexpr int64_t kCount = sizeof kSizes / sizeof kSizes[0];

// Of each format all numbers: subnormals, infinities, NaN.
void fill(std::vector<float>& values) {
    deepcore_test::Random random;
    for (float& value : values) value = float_of(random.bits());
}

template <class Narrow>
void fill(std::vector<Narrow>& values) {
    deepcore_test::Random random;
    for (Narrow& value : values) value.bits = static_cast<uint16_t>(random.bits());
}

template <class To, class From>
void list_arrives(DType to_dtype, DType from_dtype, int64_t raw_size, int64_t offset, bool streaming) {
    std::vector<From> from(8192);
    fill(from);
    std::vector<To> to(8192), expected;
    for (To& value : to) store(&value, 7.0f);
    expected = to;

    Copy copies[kCount];
    int64_t total = 0, at = 1;
    for (int64_t i = 0; i < kCount; ++i) {
        copies[i] = {to.data() + at, from.data() + offset + total, kSizes[i], total};
        for (int64_t k = 0; k < kSizes[i]; ++k) {
            if constexpr (std::is_same_v<To, From>) {
                expected[at + k] = from[offset + total + k];
            } else {
                float value;
                load(&from[offset + total + k], value);
                store(&expected[at + k], value);
            }
        }
        total += kSizes[i];
        at += kSizes[i] + 3;
    }
    const FlattenArgs args = {copies, kCount, to_dtype, from_dtype, raw_size, streaming};
    for (int64_t begin = 0; begin < total; begin += 500) {
        DEEPCORE_PICK(flatten_range)(args, begin, begin + 500 < total ? begin + 500 : total);
    }
    CHECK(memcmp(to.data(), expected.data(), to.size() * sizeof(To)) == 0);
}

void every_pair_arrives() {
    for (bool streaming : {false, true}) {
        for (int64_t offset : {0, 1, 2}) {
            list_arrives<float, float>(DType::f32, DType::f32, 4, offset, streaming);
            list_arrives<f16, f16>(DType::f16, DType::f16, 2, offset, streaming);
            list_arrives<float, bf16>(DType::f32, DType::bf16, 0, offset, streaming);
            list_arrives<float, f16>(DType::f32, DType::f16, 0, offset, streaming);
            list_arrives<bf16, float>(DType::bf16, DType::f32, 0, offset, streaming);
            list_arrives<bf16, f16>(DType::bf16, DType::f16, 0, offset, streaming);
            list_arrives<f16, float>(DType::f16, DType::f32, 0, offset, streaming);
            list_arrives<f16, bf16>(DType::f16, DType::bf16, 0, offset, streaming);
        }
    }
}

void search_skips_empty_copies() {
    const Copy copies[] = {
        {nullptr, nullptr, 0, 0}, {nullptr, nullptr, 2, 0}, {nullptr, nullptr, 0, 2}, {nullptr, nullptr, 1, 2}};
    CHECK(find_copy(copies, 4, 0) == 1);
    CHECK(find_copy(copies, 4, 1) == 1);
    CHECK(find_copy(copies, 4, 2) == 3);
}

}  // namespace

int main() {
    search_skips_empty_copies();
    CHECK(deepcore_test::for_each_variant([](const char*) { every_pair_arrives(); }) > 0);
    return deepcore_test::result();
}
