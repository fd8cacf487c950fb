// The scalar formulas of visually-guided policy optimisation, written once for the CPU and for CUDA.
//
// Nothing here includes a torch header. Formulas that run once per token are templates over the number type `F`:
// CUDA instantiates them with `float`, the CPU backend with its SIMD vectors, which bring their own `select`,
// `minimum`, `maximum`, `exponential` and `power` (found by argument-dependent lookup). A comparison of two `F`
// gives a mask; masks combine with `&`, `|` and `!`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Outside CUDA the formulas are always inlined: a translation unit compiled for AVX-512 must not leave behind an
// out-of-line copy of a shared function that the linker could pick for every other caller.
#if defined(__CUDACC__) || defined(VGPO_EMULATION)
#define VGPO_HD __host__ __device__
#elif defined(__GNUC__)
#define VGPO_HD __attribute__((always_inline))
#else
#define VGPO_HD
#endif

namespace vgpo {

// ---- elementary operations ------------------------------------------------------------------------------------

VGPO_HD inline float select(bool condition, float yes, float no) { return condition ? yes : no; }

// A NaN in the first argument survives, one in the second is dropped: put the data first and the bound second.
VGPO_HD inline float minimum(float value, float bound) { return bound < value ? bound : value; }
VGPO_HD inline float maximum(float value, float bound) { return bound > value ? bound : value; }

VGPO_HD inline float exponential(float value) { return expf(value); }
VGPO_HD inline float hyperbolic_tangent(float value) { return tanhf(value); }
VGPO_HD inline float power(float base, float exponent) { return powf(base, exponent); }

template <typename F>
VGPO_HD inline F clamped(F value, F low, F high) {
    return minimum(maximum(value, low), high);
}

// e^x - 1 - x from x and e^x, by its series where the subtraction would cancel; infinite where x is.
template <typename F>
VGPO_HD inline F exponential_excess(F x, F power) {
    F series = F(1.0f / 5040.0f) + x * F(1.0f / 40320.0f);
    series = F(1.0f / 720.0f) + x * series;
    series = F(1.0f / 120.0f) + x * series;
    series = F(1.0f / 24.0f) + x * series;
    series = F(1.0f / 6.0f) + x * series;
    series = x * x * (F(0.5f) + x * series);
    const auto small = (x < F(0.5f)) & (x > F(-0.5f));
    // Beyond the bound e^x is infinite, from which an infinite x must not be subtracted.
    return select(small, series, power - F(1.0f) - minimum(x, F(128.0f)));
}
template <typename F>
VGPO_HD inline F exponential_excess(F x) {
    return exponential_excess(x, exponential(x));
}

// Not by value - value: of a product a compiler may make a product and a difference of one rounding, which is not 0.
VGPO_HD inline bool is_finite(float value) { return fabsf(value) < INFINITY; }

// An integer that orders as the float does. -0.0 and +0.0 share a key; NaN must have been sorted out before.
VGPO_HD inline int32_t order_key(float value) {
    const float unsigned_zero = value + 0.0f;
    int32_t bits;
    memcpy(&bits, &unsigned_zero, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

VGPO_HD inline float order_key_value(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The place of a target among entries first .. first + length of the vocabulary, or -1. No difference overflows.
VGPO_HD inline int64_t column_of(int64_t target, int64_t first, int64_t length) {
    return target >= first && target - first < length ? target - first : -1;
}

// ---- order-free sums ------------------------------------------------------------------------------------------
//
// Sums that a response's factors depend on are taken over 64-bit fixed-point numbers. Integer addition is
// associative, so padding, packing, thread count and atomics cannot change a bit of them.

constexpr double kUnitScale = 1099511627776.0;  // 2^40, for normalised values in [0, 1]
constexpr double kWeightScale = 4294967296.0;   // 2^32, the largest scale of raw weights (WeightsConfig::weight_scale)
constexpr double kLargestTerm = 8796093022208.0;  // 2^43: below it, a response of 2^20 tokens cannot wrap a sum
constexpr double kFixedLimit = 2251799813685248.0;  // 2^51: a single term saturates here instead of overflowing

VGPO_HD inline int64_t to_fixed(float value, double scale) {
    double scaled = static_cast<double>(value) * scale;
    scaled = scaled < -kFixedLimit ? -kFixedLimit : scaled;
    scaled = scaled > kFixedLimit ? kFixedLimit : scaled;
    return llrint(scaled);
}

VGPO_HD inline float from_fixed(int64_t sum, double scale) {
    return static_cast<float>(static_cast<double>(sum) / scale);
}

VGPO_HD inline float mean_from_fixed(int64_t sum, double scale, int64_t count) {
    return static_cast<float>(static_cast<double>(sum) / scale / static_cast<double>(count));
}

// ---- visual focus (Eq. 3-4) -----------------------------------------------------------------------------------

constexpr float kNormFloor = 1e-8f;
// The square of a smaller norm has lost bits, which matters beside a norm so large that the floor does not decide.
constexpr float kLeastNorm = 4.440892098500626e-16f;  // 2^-51
constexpr float kLargeNorm = kNormFloor / kLeastNorm;

// Infinite where a hidden state is not finite, or a norm leaves fp32's range: NaN says that no image is seen.
VGPO_HD inline float cosine(float dot, float squared_norm, float prototype_norm) {
    const float norm = sqrtf(squared_norm), norms = norm * prototype_norm;
    const float value = dot / maximum(norms, kNormFloor);
    const bool lost = minimum(norm, prototype_norm) < kLeastNorm && maximum(norm, prototype_norm) > kLargeNorm;
    return is_finite(value) && is_finite(norms) && (!lost || dot == 0.0f) ? value : INFINITY;
}

// What a row is multiplied by to be a unit vector; NaN where the square of its norm leaves fp32's range.
VGPO_HD inline float inverse_norm(float squared_norm) {
    return is_finite(squared_norm) ? 1.0f / maximum(sqrtf(squared_norm), kNormFloor) : NAN;
}

// ---- visual weights (Eq. 5-11) --------------------------------------------------------------------------------

// In the order of the choices of vgpo_kernels/config.py, as are all enums of settings; kCount is their number.
enum class Schedule { kLinear, kExponential, kStep, kCount };
enum class Score { kAffine, kOffset, kCount };
enum class Position { kOneBased, kZeroBased, kCount };
enum class Accumulation { kCompensated, kNormalized, kMean, kCount };

constexpr float kRangeFloor = 1e-8f;   // keeps a min-max normalisation of equal values at zero
constexpr double kPositionSlack = 1e-6;  // a position one rounding error below where the schedule begins still counts
constexpr float kLargestSignal = 1024.0f;  // a cosine beyond it is broken, and spoils its response

// VGPOConfig for kernels.
struct WeightsConfig {
    float beta;
    double tail_ratio;
    double top_ratio;
    Schedule schedule;
    double start_ratio;
    float exponent;
    double step_ratio;
    bool gate;
    bool intra;
    bool inter;
    Score score;
    float score_offset;  // NaN: the smallest valid cosine of the batch, at most zero
    Position position;
    Accumulation accumulation;
    float intra_low, intra_high;
    float inter_low, inter_high;
    double weight_scale;  // of the fixed-point sum of w; derived

    // Reads every field of VGPOConfig, in its order (see SettingsReader).
    template <typename Reader>
    void read(Reader& reader) {
        reader.number("beta", beta);
        reader.ratio("tail_ratio", tail_ratio);
        reader.ratio("top_ratio", top_ratio);
        reader.code("schedule", schedule);
        reader.ratio("start_ratio", start_ratio);
        reader.number("exponent", exponent);
        reader.ratio("step_ratio", step_ratio);
        reader.flag("gate", gate);
        reader.flag("intra", intra);
        reader.flag("inter", inter);
        reader.code("score", score);
        reader.optional("score_offset", score_offset);
        reader.code("position", position);
        reader.code("accumulation", accumulation);
        reader.bounds("intra_clamp", intra_low, intra_high);
        reader.bounds("inter_clamp", inter_low, inter_high);
        weight_scale = fixed_scale();
    }

    // The largest power of two, up to kWeightScale, at which no sum wraps. It depends on the settings alone, so that
    // how a batch is cut changes no bit. (vgpo_kernels/triton_kernels/visual_weights.py has the same.)
    double fixed_scale() const {
        const double largest = static_cast<double>(kLargestSignal);
        const double offset = score_offset == score_offset ? std::fabs(static_cast<double>(score_offset)) : largest;
        const double focus = score == Score::kAffine ? (1.0 + largest) / 2.0 : largest + offset;
        double scale = kWeightScale;
        while (scale * focus * (1.0 + static_cast<double>(beta)) >= kLargestTerm) scale /= 2.0;
        return scale;
    }

    VGPO_HD bool needs_batch_offset() const { return score == Score::kOffset && score_offset != score_offset; }
};

// The tail is the valid tokens with 0-based ordinal >= tail_first; in double, as the reference implementation.
VGPO_HD inline int64_t tail_first(int64_t length, const WeightsConfig& config) {
    return static_cast<int64_t>(static_cast<double>(length) * (1.0 - config.tail_ratio));
}

// How many of the tail's tokens pass the gate (more when there are ties). 0 for an empty tail.
VGPO_HD inline int64_t tail_top_count(int64_t tail_length, const WeightsConfig& config) {
    if (tail_length <= 0) return 0;
    const int64_t count = static_cast<int64_t>(static_cast<double>(tail_length) * config.top_ratio);
    return count < 1 ? 1 : (count > tail_length ? tail_length : count);
}

// Whether a cosine can be weighted.
template <typename F>
VGPO_HD inline auto is_signal(F cos) {
    return (cos >= F(-kLargestSignal)) & (F(kLargestSignal) >= cos);
}

// Where the schedule lies in a response, counted in ordinals (0-based, of valid tokens). All that does not depend on
// the token is computed in double, so that tokens lie where the reference implementation has them, to the last bits.
struct Ramp {
    float first;              // c is zero before
    float begin, begin_rest;  // the ramp rises from 0 at their sum
    float length;             // to 1 so many ordinals later
};

VGPO_HD inline Ramp ramp_of(int64_t length, const WeightsConfig& config) {
    // p_t of an ordinal is (ordinal + ahead) / whole.
    const bool one_based = config.position == Position::kOneBased;
    const double ahead = one_based ? 1.0 : 0.0, floor = static_cast<double>(kRangeFloor);
    const double whole = one_based ? static_cast<double>(length) : static_cast<double>(length - 1) + floor;
    const bool later = config.schedule == Schedule::kStep && config.step_ratio > config.start_ratio;
    const double first = ((later ? config.step_ratio : config.start_ratio) - kPositionSlack) * whole - ahead;
    const double begin = config.start_ratio * whole - ahead;
    Ramp ramp;
    ramp.first = static_cast<float>(ceil(first));
    ramp.begin = static_cast<float>(begin);
    ramp.begin_rest = static_cast<float>(begin - static_cast<double>(ramp.begin));
    ramp.length = static_cast<float>(whole * (1.0 - config.start_ratio + floor));
    return ramp;
}

// c_t (Eq. 5).
template <typename F>
VGPO_HD inline F compensation(F ordinal, const Ramp& ramp, const WeightsConfig& config) {
    const F zero(0.0f), beta(config.beta);
    F strength = beta;
    if (config.schedule != Schedule::kStep) {
        F risen = maximum((ordinal - F(ramp.begin) - F(ramp.begin_rest)) / F(ramp.length), zero);
        if (config.schedule == Schedule::kExponential) {
            risen = minimum(risen, F(1.0f));
            risen = config.exponent == 2.0f ? risen * risen : power(risen, config.exponent);
        }
        strength = beta * risen;
    }
    return select(ordinal >= F(ramp.first), strength, zero);
}

// rho_t: (1 + cos) / 2, or cos - offset in the released variant.
template <typename F>
VGPO_HD inline F focus_score(F cos, float offset, const WeightsConfig& config) {
    if (config.score == Score::kAffine) return (F(1.0f) + cos) * F(0.5f);
    return cos - F(offset);
}

// w_t = rho_t [1 + G_t c_t] (Eq. 6). `gated_compensation` is c_t where the gate is open and 0 elsewhere.
template <typename F>
VGPO_HD inline F compensated_weight(F rho, F gated_compensation) {
    return rho * (F(1.0f) + gated_compensation);
}

// Min-max normalisation (Eq. 7 and 9).
template <typename F>
VGPO_HD inline F min_max_normalized(F value, float low, float high) {
    return (value - F(low)) / F(high - low + kRangeFloor);
}

// s_i (Eq. 9) from the fixed-point sums over a response of `length` > 0 tokens.
VGPO_HD inline float accumulated_score(int64_t weight_sum, int64_t normalized_sum, int64_t length,
                                       const WeightsConfig& config) {
    switch (config.accumulation) {
        case Accumulation::kCompensated: return from_fixed(weight_sum, config.weight_scale);
        case Accumulation::kNormalized: return from_fixed(normalized_sum, kUnitScale);
        default: return mean_from_fixed(weight_sum, config.weight_scale, length);
    }
}

// (1 + psi_t) clamped times (1 + phi) clamped.
template <typename F>
VGPO_HD inline F advantage_factor(F psi, float phi, const WeightsConfig& config) {
    const F token = clamped(F(1.0f) + psi, F(config.intra_low), F(config.intra_high));
    return token * F(clamped(1.0f + phi, config.inter_low, config.inter_high));
}

// The order of visual_weights' metrics.
enum FocusMetric {
    kFocusMean,
    kGateRate,
    kLateEarlyRatio,
    kWeightedResponses,
    kNonfiniteResponses,
    kGroups,
    kSingletonGroups,
    kFocusMetrics,
};

}  // namespace vgpo
