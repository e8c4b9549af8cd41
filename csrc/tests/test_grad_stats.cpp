// Owns the check of the grad_stats kernels: exact sums where they are exact, one order everywhere.
// Knows nothing of torch.
#include <math.h>

#include <vector>

#include "check.h"
#include "grad_stats/grad_stats_math.h"
#include "variants.h"

using namespace deepcore;

namespace {

struct Result {
    double partials[5], squares[4], summary[3];
};

template <class T>
Result run(const std::vector<T>& grad, int64_t step, DType dtype = DType::f32) {
    const auto numel = static_cast<int64_t>(grad.size());
    const int64_t first = 2 * kChunkNumel + 3;
    const Segment segments[] = {
        {0, 1, first, 0, 0}, {0, 5, 0, 0, 3}, {0, first + 1, numel - first - 2, 0, 3}, {0, 0, 1, 0, 4}};
    const int64_t offsets[] = {0, 5};
    const void* address = grad.data();
    Result result;
    const GradStatsArgs args = {dtype,          &address,      1, offsets, segments, 4, result.partials,
                                result.squares, result.summary};
    for (int64_t chunk = 0; chunk < 5; chunk += step) {
        DEEPCORE_PICK(grad_stats_chunks)(args, chunk, chunk + step < 5 ? chunk + step : 5);
    }
    DEEPCORE_PICK(grad_stats_finish)(args);
    return result;
}

void sums_of_integers_are_exact() {
    std::vector<float> grad(2 * kChunkNumel + 1000);
    double first = 0, last = 0;
    for (size_t i = 0; i < grad.size(); ++i) {
        grad[i] = static_cast<float>(static_cast<int>(i % 2001) - 1000);
        const double square = static_cast<double>(grad[i]) * grad[i];
        if (i >= 1 && i < 2 * kChunkNumel + 4) first += square;
        if (i >= 2 * kChunkNumel + 4 && i < grad.size() - 1) last += square;
    }
    const Result result = run(grad, 2);
    CHECK(result.squares[0] == first);
    CHECK(result.squares[1] == 0);
    CHECK(result.squares[2] == last);
    CHECK(result.squares[3] == 1e6);
    CHECK(result.summary[0] == first + last + 1e6);
    CHECK(result.summary[1] == 0 && result.summary[2] == -1);
}

void order_is_the_same(const std::vector<float>& grad, const Result& expected) {
    for (int64_t step : {1, 2, 5}) {
        const Result result = run(grad, step);
        for (int i = 0; i < 4; ++i) CHECK(result.squares[i] == expected.squares[i]);
        CHECK(result.summary[0] == expected.summary[0]);
    }
}

// Chunks of the first segment, which begins at element 1, and of the others: their lanes summed one by one.
template <class T>
void bits_are_those_of_plain_lanes(DType dtype) {
    deepcore_test::Random random;
    std::vector<T> grad(2 * kChunkNumel + 1000);
    for (T& x : grad) {
        store(&x, random.uniform());
        if constexpr (sizeof(T) == 2) x.bits = random.bits() & 0xbfff;  // any number below 2, subnormals too
    }
    const auto numel = static_cast<int64_t>(grad.size());
    const int64_t begins[] = {1, 1 + kChunkNumel, 1 + 2 * kChunkNumel, 4 + 2 * kChunkNumel, 0};
    const int64_t ends[] = {begins[1], begins[2], begins[3], numel - 1, 1};
    for (int64_t step : {1, 3, 5}) {
        const Result result = run(grad, step, dtype);
        for (int chunk = 0; chunk < 5; ++chunk) {
            double lanes[kLanes] = {}, value;
            for (int64_t i = begins[chunk]; i < ends[chunk]; ++i) {
                load(&grad[i], value);
                lanes[(i - begins[chunk]) % kLanes] += value * value;
            }
            CHECK(result.partials[chunk] == fold_lanes(lanes));
        }
    }
}

void bad_element_is_found(std::vector<float> grad, size_t place, float bad, int segment) {
    grad[place] = bad;
    const Result result = run(grad, 5);
    for (int i = 0; i < 4; ++i) CHECK(is_finite(result.squares[i]) == (i != segment));
    CHECK(!is_finite(result.summary[0]) && result.summary[1] == 1 && result.summary[2] == segment);
}

void bad_elements_are_found(const std::vector<float>& grad) {
    for (float bad : {INFINITY, -INFINITY, NAN}) {
        for (int64_t place : {int64_t{2}, int64_t{40}, kChunkNumel, 2 * kChunkNumel + 3}) {
            bad_element_is_found(grad, place, bad, 0);
        }
        bad_element_is_found(grad, grad.size() - 2, bad, 2);
        bad_element_is_found(grad, 0, bad, 3);
    }
}

}  // namespace

int main() {
    deepcore_test::Random random;
    std::vector<float> grad(2 * kChunkNumel + 1000);
    for (float& value : grad) value = random.uniform() * 1e3f;
    const Result expected = run(grad, 5);
    const int variants = deepcore_test::for_each_variant([&](const char*) {
        sums_of_integers_are_exact();
        order_is_the_same(grad, expected);
        bits_are_those_of_plain_lanes<float>(DType::f32);
        bits_are_those_of_plain_lanes<bf16>(DType::bf16);
        bits_are_those_of_plain_lanes<f16>(DType::f16);
        bad_elements_are_found(grad);
    });
    CHECK(variants > 0);
    return deepcore_test::result();
}
