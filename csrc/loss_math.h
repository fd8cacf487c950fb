// The scalar formulas of the policy losses, for the CPU and for CUDA: templates over a number type, as in math.h.
#pragma once

#include <limits>

#include "math.h"

namespace vgpo {

enum class LossType { kGrpo, kBnpo, kDapo, kDrGrpo, kGspo, kGspoToken, kCispo, kSapo, kLuspo, kVespo, kCount };
enum class Aggregation {
    kTokenMean,
    kSequenceMeanTokenMean,
    kSequenceMeanTokenSum,
    kSequenceMeanTokenSumNorm,
    kCount,
};
enum class KlEstimator { kK1, kK2, kK3, kK3Clamped, kCount };
enum class ImportanceMode { kTruncate, kMask, kCount };

constexpr float kLargestFloat = std::numeric_limits<float>::max();
constexpr float kKlLogRatioLimit = 20.0f;  // k3_clamped: bound of the log-ratio
constexpr float kKlLimit = 10.0f;          // k3_clamped: bound of the estimate
constexpr float kVespoLimit = 20.0f;       // vespo: bound of a token's |log-ratio|, and of a response's log w
constexpr float kVespoFloor = -18.420680743952367f;  // vespo: log 1e-8, the least log w
constexpr float kVespoLeastLambda = 1e-4f;

// PolicyLossOptions for kernels.
struct LossOptions {
    LossType loss_type;
    Aggregation aggregation;
    float epsilon_low, epsilon_high;
    float dual_clip;  // infinity: none
    float kl_coef;
    KlEstimator kl_estimator;
    float entropy_coef;
    float max_length;  // 0: none
    float tau_positive, tau_negative;
    float vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
    float ratio_clamp;  // bound of |log-ratio|; infinity: none
    float cispo_cap;    // NaN: clip to [1 - epsilon_low, 1 + epsilon_high]
    bool kl_bias_correction;
    float importance_cap;  // infinity: none
    ImportanceMode importance_mode;

    // Reads every field of PolicyLossOptions, in its order (see SettingsReader).
    template <typename Reader>
    void read(Reader& reader) {
        reader.code("loss_type", loss_type);
        reader.code("aggregation", aggregation);
        reader.number("epsilon_low", epsilon_low);
        reader.number("epsilon_high", epsilon_high);
        reader.optional("dual_clip", dual_clip);
        reader.number("kl_coef", kl_coef);
        reader.code("kl_estimator", kl_estimator);
        reader.number("entropy_coef", entropy_coef);
        reader.optional("max_length", max_length);
        reader.number("sapo_temperature_positive", tau_positive);
        reader.number("sapo_temperature_negative", tau_negative);
        reader.number("vespo_k_pos", vespo_k_pos);
        reader.number("vespo_lambda_pos", vespo_lambda_pos);
        reader.number("vespo_k_neg", vespo_k_neg);
        reader.number("vespo_lambda_neg", vespo_lambda_neg);
        reader.optional("ratio_clamp", ratio_clamp);
        reader.optional("cispo_cap", cispo_cap);
        reader.flag("kl_bias_correction", kl_bias_correction);
        reader.optional("importance_cap", importance_cap);
        reader.code("importance_mode", importance_mode);
    }

    VGPO_HD bool vespo() const { return loss_type == LossType::kVespo; }
    // The ratio of these losses is one number per response, of its mean log-ratio.
    VGPO_HD bool sequence_ratio() const { return through_mean() || loss_type == LossType::kGspoToken; }
    // Every token's gradient goes through that mean.
    VGPO_HD bool through_mean() const { return loss_type == LossType::kGspo || loss_type == LossType::kLuspo; }
    // A sum over the response must be known first (see SequenceTerms).
    VGPO_HD bool sequence_level() const { return sequence_ratio() || vespo(); }
};

// What a comparison of two F gives.
template <typename F>
using MaskOf = decltype(F() < F());

// An importance ratio, which is also its derivative w.r.t. the log-ratio, and where the clamp makes it a constant. A
// constant is told by this mask: a derivative of zero would make NaN of what is infinite.
template <typename F>
struct Ratio {
    F value;
    MaskOf<F> constant;
};

template <typename F>
VGPO_HD inline Ratio<F> importance_ratio(F log_ratio, const LossOptions& options) {
    const F limit(options.ratio_clamp), negative_limit(-options.ratio_clamp);
    const MaskOf<F> constant = (log_ratio > limit) | (log_ratio < negative_limit);
    return {exponential(clamped(log_ratio, negative_limit, limit)), constant};
}

// Importance-sampling correction of the sampler's mismatch: truncated at the cap, or zero beyond it.
template <typename F>
VGPO_HD inline F importance_correction(F weight, const LossOptions& options) {
    const F cap(options.importance_cap);
    if (options.importance_mode == ImportanceMode::kTruncate) return minimum(weight, cap);
    return select(weight > cap, F(0.0f), weight);
}

// What the tokens of a sequence-level loss read of their response.
struct SequenceTerms {
    float mean_log_ratio;             // of losses with a sequence ratio
    float vespo_gains, vespo_losses;  // vespo's weight of an advantage that is not negative, and of one that is
};

// The bound of a token's log-ratio in the sum that SequenceTerms are made of.
VGPO_HD inline float summed_limit(const LossOptions& options) { return options.vespo() ? kVespoLimit : INFINITY; }

// What an importance weight adds to that sum in vespo, which corrects its w instead of the surrogate.
VGPO_HD inline float log_importance(float weight, const LossOptions& options) {
    return clamped(logf(importance_correction(weight, options)), kVespoFloor, kVespoLimit);
}

// phi(w) = w^k e^(lambda (1 - w)), 0 where it is not finite.
VGPO_HD inline float vespo_weight(float log_weight, float k, float lambda) {
    const float decay = maximum(lambda, kVespoLeastLambda);
    const float weight = expf(decay + k * log_weight - decay * expf(log_weight));
    return is_finite(weight) ? weight : 0.0f;
}

// From the sum over a response of `length` tokens.
VGPO_HD inline SequenceTerms sequence_terms(double sum, int64_t length, const LossOptions& options) {
    if (!options.vespo()) return {static_cast<float>(sum / static_cast<double>(length < 1 ? 1 : length)), 0.0f, 0.0f};
    const float log_weight = clamped(static_cast<float>(sum), kVespoFloor, kVespoLimit);
    return {0.0f, vespo_weight(log_weight, options.vespo_k_pos, options.vespo_lambda_pos),
            vespo_weight(log_weight, options.vespo_k_neg, options.vespo_lambda_neg)};
}

// The surrogate of one token: its value, its derivative w.r.t. the log-ratio, and 0/1 indicators.
template <typename F>
struct Surrogate {
    F value;
    F slope;
    F clipped_low;
    F clipped_high;
    F dual_clipped;
};

// `advantage` is A times the factor: where it is zero so is the surrogate, whatever the ratio and the log-prob are.
// `log_prob` enters the values of CISPO and VESPO alone.
template <typename F>
VGPO_HD inline Surrogate<F> surrogate(Ratio<F> ratio, F log_prob, F advantage, const SequenceTerms& sequence,
                                      const LossOptions& options) {
    const F zero(0.0f), one(1.0f);
    const F negated = zero - advantage;
    const auto nothing = advantage == zero;
    Surrogate<F> result;
    result.clipped_low = result.clipped_high = result.dual_clipped = zero;
    if (options.loss_type == LossType::kSapo) {
        const F tau = select(advantage > zero, F(options.tau_positive), F(options.tau_negative));
        const F exponent = tau * (ratio.value - one);
        const F falling = exponential(zero - exponent);
        const F gate = one / (one + falling);
        // 1 - gate, which cancels where the gate is wide open. There it vanishes faster than any ratio grows.
        const F closing = select(exponent > zero, falling * gate, one - gate);
        const F steepness = F(4.0f) * gate * closing * minimum(ratio.value, F(kLargestFloat));
        result.value = select(nothing, zero, negated * (gate * F(4.0f) / tau));
        result.slope = select(nothing | ratio.constant, zero, negated * steepness);
        return result;
    }
    if (options.vespo()) {
        const F weight = select(advantage >= zero, F(sequence.vespo_gains), F(sequence.vespo_losses));
        result.slope = select(nothing, zero, negated * weight);
        result.value = select(result.slope == zero, zero, result.slope * log_prob);
        return result;
    }
    const bool capped = options.loss_type == LossType::kCispo && options.cispo_cap == options.cispo_cap;
    const F low(capped ? -INFINITY : 1.0f - options.epsilon_low);
    const F high(capped ? options.cispo_cap : 1.0f + options.epsilon_high);
    const F clipped_ratio = clamped(ratio.value, low, high);
    const auto below = ratio.value < low, above = ratio.value > high;
    if (options.loss_type == LossType::kCispo) {
        result.clipped_low = select(below, one, zero);
        result.clipped_high = select(above, one, zero);
        result.slope = select(nothing, zero, negated * clipped_ratio);
        // A weight of zero makes nothing of any log-prob, also of one of minus infinity.
        result.value = select(result.slope == zero, zero, result.slope * log_prob);
        return result;
    }
    const auto dual = (advantage < zero) & (ratio.value > F(options.dual_clip));
    const F unclipped = negated * select(dual, F(options.dual_clip), ratio.value);
    const F clipped = negated * clipped_ratio;
    const auto clips = clipped > unclipped;
    const auto constant = nothing | ratio.constant | (clips & (below | above)) | (dual & !clips);
    result.value = select(nothing, zero, maximum(unclipped, clipped));
    result.slope = select(constant, zero, negated * ratio.value);
    result.clipped_low = select(below & (advantage < zero), one, zero);
    result.clipped_high = select(above & (advantage > zero), one, zero);
    result.dual_clipped = select(dual, one, zero);
    return result;
}

// Multiplies a surrogate by an importance weight, one of zero to zero.
template <typename F>
VGPO_HD inline void apply_importance(Surrogate<F>& term, F importance, F advantage) {
    const F zero(0.0f);
    const auto nothing = (importance == zero) | (advantage == zero);
    term.value = select(nothing, zero, importance * term.value);
    term.slope = select(nothing | (term.slope == zero), zero, importance * term.slope);
}

// A KL estimate and its derivative w.r.t. logp.
template <typename F>
struct Kl {
    F value;
    F slope;
};

// KL of the policy to the reference, estimated at a token of the policy's.
template <typename F>
VGPO_HD inline Kl<F> kl_estimate(F log_prob, F ref_log_prob, const LossOptions& options) {
    const F zero(0.0f);
    const F difference = ref_log_prob - log_prob;
    switch (options.kl_estimator) {
        case KlEstimator::kK1: return {zero - difference, F(1.0f)};
        case KlEstimator::kK2: return {F(0.5f) * difference * difference, zero - difference};
        case KlEstimator::kK3: {
            const F excess = exponential_excess(difference);
            // The slope is 1 - e^difference, which is 1 where minus infinity may stand.
            return {excess, select(difference < F(-20.0f), F(1.0f), zero - (excess + difference))};
        }
        default: {
            const F limit(kKlLogRatioLimit), negative_limit(-kKlLogRatioLimit), cap(kKlLimit);
            const F bounded = clamped(difference, negative_limit, limit);
            const F excess = exponential_excess(bounded);
            const auto flat = (difference > limit) | (difference < negative_limit) | (excess > cap);
            return {minimum(excess, cap), select(flat, zero, zero - (excess + bounded))};
        }
    }
}

// A term of the loss whose coefficient is zero is off: it adds nothing, whatever it is.

// Adds the KL term to a token's loss, and to its derivatives w.r.t. the log-ratio and, in `direct`, w.r.t. logp
// otherwise. Returns the estimate.
template <typename F>
VGPO_HD inline F add_kl(Surrogate<F>& term, F& direct, Kl<F> kl, Ratio<F> ratio, const LossOptions& options) {
    const F coefficient(options.kl_coef);
    if (options.kl_bias_correction) {
        // A slope of zero stays one beside an infinite ratio.
        kl = {kl.value * ratio.value, select(kl.slope == F(0.0f), F(0.0f), kl.slope * ratio.value)};
    }
    if (options.kl_coef == 0.0f) return kl.value;
    const F weighted = coefficient * kl.value;
    term.value = term.value + weighted;
    direct = coefficient * kl.slope;
    if (options.kl_bias_correction) term.slope = term.slope + select(ratio.constant, F(0.0f), weighted);
    return kl.value;
}

template <typename F>
VGPO_HD inline void subtract_bonus(Surrogate<F>& term, F entropy, const LossOptions& options) {
    if (options.entropy_coef != 0.0f) term.value = term.value - F(options.entropy_coef) * entropy;
}

VGPO_HD inline float nonzero(float count) { return count == 0.0f ? 1.0f : count; }

// What one token of a response of `length` valid tokens counts in the loss. Each denominator of zero counts as one.
VGPO_HD inline float token_scale(int64_t length, float num_tokens, float num_sequences, const LossOptions& options) {
    const float sequences = nonzero(num_sequences);
    switch (options.aggregation) {
        case Aggregation::kTokenMean: return 1.0f / nonzero(num_tokens);
        case Aggregation::kSequenceMeanTokenMean: return 1.0f / (nonzero(static_cast<float>(length)) * sequences);
        case Aggregation::kSequenceMeanTokenSum: return 1.0f / sequences;
        default: return 1.0f / (sequences * options.max_length);
    }
}

// Count, sum and sum of squares of factors, less an origin that is one of them: equal factors deviate by nothing, and
// sums of deviations do not cancel.
struct FactorMoments {
    double origin, count, sum, squares;

    VGPO_HD inline void add(FactorMoments other) {
        if (count == 0.0) origin = other.origin;
        other = other.moved_to(origin);
        count += other.count;
        sum += other.sum;
        squares += other.squares;
    }
    // The same deviations from another origin.
    VGPO_HD inline FactorMoments moved_to(double other) const {
        if (other == origin) return *this;
        const double shift = origin - other;
        return {other, count, sum + count * shift, squares + 2.0 * shift * sum + count * shift * shift};
    }
    VGPO_HD inline double mean() const { return origin + sum / count; }
    VGPO_HD inline double deviation() const {
        const double offset = sum / count, variance = squares / count - offset * offset;
        return sqrt(variance < 0.0 ? 0.0 : variance);
    }
};

// A smallest or largest value, of which not every backend's comparisons see a NaN; the mean is NaN then.
VGPO_HD inline float unless_nan(float mean, float extreme) { return mean != mean ? mean : extreme; }

// Where a piece's factors are measured from: one of its own, if that is finite.
VGPO_HD inline float factor_origin(float factor) { return is_finite(factor) ? factor : 1.0f; }

// The order of policy_loss's metrics.
enum PolicyMetric {
    kClipFraction,
    kClipFractionLow,
    kClipFractionHigh,
    kDualClipFraction,
    kRatioMean,
    kRatioMin,
    kRatioMax,
    kApproxKl,
    kRefKl,
    kEntropy,
    kFactorMean,
    kFactorMin,
    kFactorMax,
    kFactorStd,
    kNumTokens,
    kNonfiniteAdvantages,
    kPolicyMetrics,
};

}  // namespace vgpo
