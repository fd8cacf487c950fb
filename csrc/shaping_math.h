// The scalar formulas of the family of perception-aware methods (vgpo_kernels/shaping.py), for the CPU and for CUDA.
//
// As in math.h: no torch header, and what runs once per token is a template over the number type `F`.
#pragma once

#include "math.h"

namespace vgpo {

// In the order of the choices of vgpo_kernels/shaping.py.
enum class Fusion { kVisual, kSoftOr, kCount };
enum class TokenWeight { kOnes, kSoftmax, kGate, kShare, kCount };
enum class SelectionScope { kResponse, kGroup, kBatch, kCount };
enum class ResponseWeight { kNone, kMinMax, kMedianMad, kSoftmax, kCount };
enum class ResponseScope { kGroup, kBatch, kCount };
enum class Weighed { kAll, kVisual, kCount };
enum class ShapingSchedule { kNone, kLinear, kCount };

constexpr float kMassFloor = 1e-8f;       // of a response's weights, a mean, a median absolute deviation
constexpr float kLeastRange = 1e-6f;      // scores of responses that differ by no more are equal
constexpr float kDeviationFloor = 1e-6f;
constexpr double kCountSlack = 1e-6;      // a fraction of tokens one rounding error above a whole number is that number

// ShapingConfig for kernels.
struct ShapingConfig {
    bool log1p;
    Fusion fusion;
    float fusion_weight;
    bool times_entropy;
    float range_floor;
    TokenWeight weight;
    float temperature;
    float entropy_gate;
    float threshold;
    float boost;
    float floor;
    bool conserve;
    float share;
    double top_visual;  // 0: no such selection, as top_entropy
    double top_entropy;
    SelectionScope scope;
    float visual_weight, entropy_weight, other_weight;
    ResponseWeight response;
    ResponseScope response_scope;
    float response_floor;
    float response_scale;
    float response_temperature;
    Weighed response_on;
    ShapingSchedule schedule;

    // Reads every field of vgpo_kernels.ShapingConfig, in its order (see SettingsReader).
    template <typename Reader>
    void read(Reader& reader) {
        reader.flag("log1p", log1p);
        reader.code("fusion", fusion);
        reader.ratio("fusion_weight", fusion_weight);
        reader.flag("times_entropy", times_entropy);
        reader.number("range_floor", range_floor);
        reader.code("weight", weight);
        reader.number("temperature", temperature);
        reader.number("entropy_gate", entropy_gate);
        reader.ratio("threshold", threshold);
        reader.number("boost", boost);
        reader.number("floor", floor);
        reader.flag("conserve", conserve);
        reader.ratio("share", share);
        reader.ratio("top_visual", top_visual);
        reader.ratio("top_entropy", top_entropy);
        reader.code("scope", scope);
        reader.number("visual_weight", visual_weight);
        reader.number("entropy_weight", entropy_weight);
        reader.number("other_weight", other_weight);
        reader.code("response", response);
        reader.code("response_scope", response_scope);
        reader.ratio("response_floor", response_floor);
        reader.ratio("response_scale", response_scale);
        reader.number("response_temperature", response_temperature);
        reader.code("response_on", response_on);
        reader.code("schedule", schedule);
    }

    VGPO_HD bool selects() const { return top_visual > 0.0 || top_entropy > 0.0; }
    // Which extremes are needed: those of the visual signal for the gate, the softmax's gate and the fused score, ...
    VGPO_HD bool gates_by_entropy() const { return weight == TokenWeight::kSoftmax && entropy_gate > 0.0f; }
    VGPO_HD bool fuses() const { return fusion == Fusion::kSoftOr; }
    VGPO_HD bool reads_entropy() const { return times_entropy || top_entropy > 0.0 || gates_by_entropy(); }
};

// ---- sums whose order changes no bit --------------------------------------------------------------------------

// The scale at which values of at most `largest` in magnitude are added in fixed point: a power of two, such that none
// reaches 2^43, and 2^20 of them do not wrap. It depends on the largest alone, so padding, packing and threads change
// no bit of a sum.
VGPO_HD inline double fixed_scale_of(float largest) {
    uint32_t bits;
    memcpy(&bits, &largest, sizeof bits);
    int exponent = static_cast<int>(bits >> 23 & 0xffu) - 127;
    exponent = exponent < -126 ? -126 : exponent;  // of zero and subnormal numbers
    return ldexp(1.0, 42 - exponent);
}

// ---- a token --------------------------------------------------------------------------------------------------

// Min-max normalisation within a response.
template <typename F>
VGPO_HD inline F normalized_in(F value, float low, float high, float floor) {
    return (value - F(low)) / F(maximum(high - low, floor));
}

// log(1 + x) of x >= 0, and powers of numbers in [0, 1]: vectors bring their own.
VGPO_HD inline float log_one_plus(float value) { return log1pf(value); }
VGPO_HD inline float power_of_unit(float base, float exponent) { return powf(base, exponent); }

// What the gate normalises.
template <typename F>
VGPO_HD inline F gated_signal(F visual, const ShapingConfig& config) {
    return config.log1p ? log_one_plus(maximum(visual, F(0.0f))) : visual;
}

// The gate's weight of a normalised signal.
template <typename F>
VGPO_HD inline F gate_weight(F unit, const ShapingConfig& config) {
    const F below = maximum(unit / F(config.threshold), F(config.floor));
    const F above = F(1.0f) + F(config.boost) * (unit - F(config.threshold)) / F(1.0f - config.threshold);
    return select(unit < F(config.threshold), below, above);
}

// The exponent of the softmax. `mixed` is the sum of both normalised signals, `mean` its mean over the response.
template <typename F>
VGPO_HD inline F softmax_power(F visual, F mixed, float mean, const ShapingConfig& config) {
    const F power = visual / F(config.temperature);
    if (!config.gates_by_entropy()) return power;
    return power * (F(1.0f) + F(config.entropy_gate) * hyperbolic_tangent(mixed - F(mean)));
}

// 1 - (1 - x)^a (1 - d)^(1 - a) of normalised signals.
template <typename F>
VGPO_HD inline F soft_or(F visual, F gap, const ShapingConfig& config) {
    const F one(1.0f);
    return one - power_of_unit(one - visual, config.fusion_weight) *
                     power_of_unit(one - gap, 1.0f - config.fusion_weight);
}

// How many tokens the top fraction of `number` are.
VGPO_HD inline int64_t top_count(int64_t number, double fraction) {
    const auto count = static_cast<int64_t>(ceil(static_cast<double>(number) * fraction - kCountSlack));
    return count < 1 ? 1 : count;
}

// The weight that a selection gives a token.
VGPO_HD inline float selection_weight(bool by_visual, bool by_entropy, const ShapingConfig& config) {
    if (by_entropy) return config.entropy_weight;
    return by_visual ? config.visual_weight : config.other_weight;
}

// Weights of the chosen tokens of a response of `number` and of its others, by which the chosen have config.share.
struct SharedWeights {
    float chosen, others;
};

VGPO_HD inline SharedWeights shared_weights(int64_t number, int64_t chosen, const ShapingConfig& config) {
    if (chosen == 0 || chosen == number) return {1.0f, 1.0f};
    const auto all = static_cast<float>(number);
    return {config.share * all / static_cast<float>(chosen),
            (1.0f - config.share) * all / static_cast<float>(number - chosen)};
}

VGPO_HD inline float faded_in(float weight, float progress, const ShapingConfig& config) {
    return config.schedule == ShapingSchedule::kNone ? weight : 1.0f + progress * (weight - 1.0f);
}

// ---- a response -----------------------------------------------------------------------------------------------

// ResponseWeight::kMinMax: a score, the extremes of those it is compared with, and the mean of their normalised ones.
VGPO_HD inline float min_max_unit(float score, float low, float high) {
    return high - low > kLeastRange ? (score - low) / (high - low) : 0.0f;
}

VGPO_HD inline float min_max_factor(float unit, float mean, float low, float high, const ShapingConfig& config) {
    if (!(high - low > kLeastRange)) return 1.0f;
    const float floor = config.response_floor, most = floor + (1.0f - floor) / (mean + kMassFloor);
    return floor + unit * (most - floor);
}

// ResponseWeight::kMedianMad, of a score's distance from the median and the median of such distances.
VGPO_HD inline float median_factor(float distance, float deviation, const ShapingConfig& config) {
    return 1.0f + config.response_scale * hyperbolic_tangent(distance / (deviation + kMassFloor));
}

// ResponseWeight::kSoftmax: the exponent, of a score's distance from the mean and the standard deviation.
VGPO_HD inline float response_power(float distance, float deviation, const ShapingConfig& config) {
    return distance / (deviation + kDeviationFloor) / config.response_temperature;
}

// The order of token_shaping's metrics.
enum ShapingMetric { kSignalMean, kSelectedRate, kShapedResponses, kNonfiniteSignals, kShapingMetrics };

}  // namespace vgpo
