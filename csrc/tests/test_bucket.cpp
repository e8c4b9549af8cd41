// Owns the check of the bucket kernels: every variant gives the bits of a sum in rank order, in any split of the work.
// Knows nothing of torch.
#include <math.h>
#include <string.h>

#include <vector>

#include "bucket/bucket_math.h"
#include "check.h"
#include "core/lanes.h"
#include "variants.h"

using namespace deepcore;

namespace {

struct Case {
    DType out_dtype, part_dtype;
    int64_t numel, num_parts;
    float divisor;
    bool accumulate, streaming;
    int64_t offset, step;  // of the memories from an aligned address, in elements; of the work
};

// By the definition: each operation rounds on its own, a division is a division.
template <class To, class From>
std::vector<To> expected_sums(std::vector<To> out, const From* parts, const Case& c) {
    for (int64_t i = 0; i < c.numel; ++i) {
        float total, other;
        load(parts + i, total);
        for (int64_t k = 1; k < c.num_parts; ++k) {
            load(parts + k * c.numel + i, other);
            total = total + other;
        }
        total = total / c.divisor;
        if (c.accumulate) {
            load(&out[c.offset + i], other);
            total = other + total;
        }
        store(&out[c.offset + i], total);
    }
    return out;
}

template <class To, class From>
void sums_are_exact(const Case& c) {
    deepcore_test::Random random;
    std::vector<From> parts(c.offset + c.num_parts * c.numel);
    std::vector<To> out(c.offset + c.numel + 9);
    for (From& value : parts) store(&value, random.uniform() * 100);
    for (To& value : out) store(&value, random.uniform());
    const std::vector<To> expected = expected_sums(out, parts.data() + c.offset, c);

    BucketArgs args = {
        c.out_dtype,  c.part_dtype, out.data() + c.offset, parts.data() + c.offset, c.numel, c.num_parts, 0, false,
        c.accumulate, c.streaming};
    set_divisor(args, c.divisor);
    for (int64_t begin = 0; begin < c.numel; begin += c.step) {
        DEEPCORE_PICK(bucket_range)(args, begin, begin + c.step < c.numel ? begin + c.step : c.numel);
    }
    CHECK(memcmp(out.data(), expected.data(), out.size() * sizeof(To)) == 0);
}

void every_kind_of_sum_is_exact() {
    for (int64_t num_parts : {1, 2, 3, 7}) {
        for (float divisor : {1.0f, 2.0f, 3.0f}) {
            for (bool accumulate : {false, true}) {
                const int64_t offset = num_parts % 4, step = accumulate ? 2500 : 4500;
                Case c = {DType::f32, DType::f32, 4099, num_parts, divisor, accumulate, num_parts > 1, offset, step};
                sums_are_exact<float, float>(c);
                c.part_dtype = DType::bf16;
                sums_are_exact<float, bf16>(c);
                c.out_dtype = DType::f16;
                sums_are_exact<f16, bf16>(c);
                c.part_dtype = DType::f32;
                sums_are_exact<f16, float>(c);
                c.out_dtype = c.part_dtype = DType::bf16;
                sums_are_exact<bf16, bf16>(c);
                c.part_dtype = DType::f16;
                sums_are_exact<bf16, f16>(c);
            }
        }
    }
    for (int64_t numel : {0, 1, 15, 63, 64, 65, 127, 2049}) {
        sums_are_exact<float, float>({DType::f32, DType::f32, numel, 1, 0.75f, true, false, 1, 5000});
        sums_are_exact<float, float>({DType::f32, DType::f32, numel, 4, 1, false, true, 3, 5000});
    }
}

// Chunks give what ranges give, and the squares of that by the definition; what lies between segments is left alone.
template <class To>
void squares_are_those_of_the_sums(DType dtype, bool accumulate, bool streaming) {
    constexpr int64_t kNumel = kChunkNumel + 200, kParts = 2;
    const Segment segments[] = {{0, 3, kChunkNumel + 5, 0, 0}, {0, kChunkNumel + 64, 100, 0, 2}};
    deepcore_test::Random random;
    std::vector<float> parts(kNumel * kParts);
    std::vector<To> sums(kNumel);
    for (float& value : parts) value = random.uniform();
    for (To& value : sums) store(&value, random.uniform());
    std::vector<To> out = sums;
    const std::vector<To> before = sums;

    BucketArgs args = {dtype, DType::f32, sums.data(), parts.data(), kNumel, kParts, 0, false, accumulate, false};
    set_divisor(args, 3);
    DEEPCORE_PICK(bucket_range)(args, 0, kNumel);
    double partials[3] = {}, expected[3] = {};
    GradStatsArgs stats = {};
    stats.segments = segments;
    stats.num_segments = 2;
    stats.partials = partials;
    args.out = out.data();
    args.streaming = streaming;
    for (int64_t chunk = 0; chunk < 3; ++chunk) DEEPCORE_PICK(bucket_chunks)(args, stats, chunk, chunk + 1);

    std::vector<To> want = before;
    for_each_chunk(segments, 2, 0, 3, [&](int64_t, int64_t chunk, Span span) {
        double lanes[kLanes] = {}, value;
        for (int64_t i = span.begin; i < span.end; ++i) {
            want[i] = sums[i];
            load(&sums[i], value);
            lanes[(i - span.begin) % kLanes] += value * value;
        }
        expected[chunk] = fold_lanes(lanes);
    });
    CHECK(memcmp(partials, expected, sizeof expected) == 0);
    CHECK(memcmp(out.data(), want.data(), kNumel * sizeof(To)) == 0);
}

void every_kind_of_square_is_exact() {
    for (bool accumulate : {false, true}) {
        squares_are_those_of_the_sums<float>(DType::f32, accumulate, !accumulate);
        squares_are_those_of_the_sums<bf16>(DType::bf16, accumulate, !accumulate);
        squares_are_those_of_the_sums<f16>(DType::f16, accumulate, false);
    }
}

// Where set_divisor multiplies instead, the bits are those of a division, down to subnormals and up to infinity.
void powers_of_two_divide_exactly() {
    deepcore_test::Random random;
    for (int exponent = -126; exponent <= 127; ++exponent) {
        for (float divisor : {ldexpf(1, exponent), ldexpf(-1, exponent)}) {
            BucketArgs args = {};
            set_divisor(args, divisor);
            CHECK(args.divide == (exponent == 127));
            for (int i = 0; i < 200; ++i) {
                const volatile float x = float_of(random.bits()), by = divisor;
                const float quotient = x / by, got = args.divide ? x / args.by : x * args.by;
                CHECK(bits_of(got) == bits_of(quotient) || (isnan(got) && isnan(quotient)));
            }
        }
    }
    for (float divisor : {3.0f, 1.5f, 0x1p-127f, 0x1.000002p0f}) CHECK(!reciprocal_is_exact(divisor));
}

}  // namespace

int main() {
    powers_of_two_divide_exactly();
    CHECK(deepcore_test::for_each_variant([](const char*) {
              every_kind_of_sum_is_exact();
              every_kind_of_square_is_exact();
          }) > 0);
    return deepcore_test::result();
}
