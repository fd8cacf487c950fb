// The policy loss of one response's tokens. Include after vector_math.h, inside the vector's namespace.

inline double log_ratio_sum(const float* logp, const float* old_logp, int64_t length, float limit) {
    const Vector high(limit), low(-limit);
    double total = 0.0;
    for (int64_t begin = 0; begin < length; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < length ? begin + kSumBlock : length;
        Vector block(0.0f);
        for (int64_t i = begin; i < end; i += Vector::kWidth) {
            const int lanes = lanes_of(i, end);
            block = block + clamped(load_first(logp + i, lanes) - load_first(old_logp + i, lanes), low, high);
        }
        const float of_block = sum(block);
        if (vgpo::is_finite(of_block)) {
            total += of_block;
            continue;
        }
        // Not finite, or too large for the order of lanes.
        for (int64_t i = begin; i < end; ++i) total += clamped(logp[i] - old_logp[i], -limit, limit);
    }
    return total;
}

inline Vector load_or(const float* from, int64_t index, int lanes, float otherwise) {
    return from == nullptr ? Vector(otherwise) : load_first(from + index, lanes);
}
inline Vector load_or(const SpreadInput& from, int64_t index, int lanes, float otherwise) {
    return from.per_token ? load_first(from.values + index, lanes) : Vector(from.values ? *from.values : otherwise);
}

// Tokens whose advantage, with its factor, is not finite.
inline int64_t nonfinite_advantages(const LossTokens& tokens, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
        const float factor = tokens.factors == nullptr ? 1.0f : tokens.factors[i];
        count += !vgpo::is_finite(tokens.advantages.at(0, i) * factor);
    }
    return count;
}

// Moments of factors whose squares are too large for fp32.
inline FactorMoments wide_moments(const float* factors, int64_t begin, int64_t end, double origin) {
    FactorMoments moments = {origin, 0.0, 0.0, 0.0};
    for (int64_t i = begin; i < end; ++i) {
        const double deviation = factors[i] - origin;
        moments.add({origin, 1.0, deviation, deviation * deviation});
    }
    return moments;
}

// In place of a mask: all lanes of a vector hold a token.
struct AllLanes {};
inline Vector select(AllLanes, Vector yes, Vector) { return yes; }

// At most kSumBlock tokens: lane sums are folded into doubles once.
inline void policy_loss_block(const LossTokens& tokens, int64_t begin, int64_t end, float* grad_logp, LossSums& sums) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const LossOptions& options = tokens.options;
    const bool through_mean = options.through_mean();
    const bool corrected = tokens.importance.values != nullptr && !options.vespo();
    const Vector zero(0.0f), scale(tokens.scale), origin(static_cast<float>(sums.factors.origin));
    Vector witness(0.0f);  // NaN beside an advantage that is not finite
    Vector loss(0.0f), clipped_low(0.0f), clipped_high(0.0f), dual_clipped(0.0f), ratio_sum(0.0f), old_kl(0.0f);
    Vector ref_kl(0.0f), entropy_sum(0.0f), factor_sum(0.0f), factor_square(0.0f), sequence_slope(0.0f);
    Vector ratio_min(kInfinity), ratio_max(-kInfinity), factor_min(kInfinity), factor_max(-kInfinity);
    const auto take = [&](int64_t i, int lanes, auto present) {
        const Vector logp = load_first(tokens.logp + i, lanes);
        const Vector log_ratio = logp - load_first(tokens.old_logp + i, lanes);
        const Vector factor = load_or(tokens.factors, i, lanes, 1.0f);
        const Vector advantage = load_or(tokens.advantages, i, lanes, 0.0f) * factor;
        const Vector exponent = options.sequence_ratio() ? Vector(tokens.sequence.mean_log_ratio) : log_ratio;
        const Ratio<Vector> ratio = importance_ratio(exponent, options);
        Surrogate<Vector> term = surrogate(ratio, logp, advantage, tokens.sequence, options);
        Vector direct = zero;  // derivative w.r.t. logp other than through the (mean) log-ratio
        if (corrected) {
            const Vector weight = load_or(tokens.importance, i, lanes, 1.0f);
            apply_importance(term, importance_correction(weight, options), advantage);
            witness = witness + (advantage - advantage);
        }
        if (tokens.ref_logp != nullptr) {
            const Kl<Vector> kl = kl_estimate(logp, load_first(tokens.ref_logp + i, lanes), options);
            ref_kl = ref_kl + select(present, add_kl(term, direct, kl, ratio, options), zero);
        }
        if (tokens.entropy != nullptr) {
            const Vector entropy = load_first(tokens.entropy + i, lanes);
            subtract_bonus(term, entropy, options);
            entropy_sum = entropy_sum + entropy;
        }
        store_first(grad_logp + i, scale * (through_mean ? direct : term.slope + direct), lanes);

        loss = loss + select(present, scale * term.value, zero);
        if (through_mean) sequence_slope = sequence_slope + select(present, scale * term.slope, zero);
        clipped_low = clipped_low + select(present, term.clipped_low, zero);
        clipped_high = clipped_high + select(present, term.clipped_high, zero);
        dual_clipped = dual_clipped + select(present, term.dual_clipped, zero);
        ratio_sum = ratio_sum + select(present, ratio.value, zero);
        const Vector bounded = clamped(log_ratio, Vector(-options.ratio_clamp), Vector(options.ratio_clamp));
        // Of a token's own ratio, which is that of the loss unless that is the response's.
        const Vector power = options.sequence_ratio() ? exponential(bounded) : ratio.value;
        old_kl = old_kl + select(present, exponential_excess(bounded, power), zero);
        ratio_min = minimum(ratio_min, select(present, ratio.value, Vector(kInfinity)));
        ratio_max = maximum(ratio_max, select(present, ratio.value, Vector(-kInfinity)));
        if (tokens.factors == nullptr) return;
        const Vector deviation = select(present, factor - origin, zero);
        factor_sum = factor_sum + deviation;
        factor_square = factor_square + deviation * deviation;
        factor_min = minimum(factor_min, select(present, factor, Vector(kInfinity)));
        factor_max = maximum(factor_max, select(present, factor, Vector(-kInfinity)));
    };
    int64_t i = begin;
    for (; i + Vector::kWidth <= end; i += Vector::kWidth) take(i, Vector::kWidth, AllLanes{});
    if (i < end) take(i, lanes_of(i, end), first_lanes(lanes_of(i, end)));
    if (tokens.factors == nullptr) factor_min = factor_max = Vector(1.0f);
    const float total = sum(loss);
    sums.loss += total;
    // No loss is finite of which an advantage is not, unless an importance weight of zero hides it.
    if (!vgpo::is_finite(total + sum(witness))) sums.nonfinite_advantages += nonfinite_advantages(tokens, begin, end);
    sums.clipped_low += sum(clipped_low);
    sums.clipped_high += sum(clipped_high);
    sums.dual_clipped += sum(dual_clipped);
    sums.ratio += sum(ratio_sum);
    sums.old_kl += sum(old_kl);
    sums.ref_kl += sum(ref_kl);
    sums.entropy += sum(entropy_sum);
    const double count = static_cast<double>(end - begin);
    FactorMoments factors = {sums.factors.origin, count, sum(factor_sum), sum(factor_square)};
    if (!vgpo::is_finite(factors.squares)) factors = wide_moments(tokens.factors, begin, end, factors.origin);
    sums.factors.add(factors);
    sums.sequence_slope += sum(sequence_slope);
    sums.ratio_min = minimum(sums.ratio_min, lowest(ratio_min));
    sums.ratio_max = maximum(sums.ratio_max, highest(ratio_max));
    sums.factor_min = minimum(sums.factor_min, lowest(factor_min));
    sums.factor_max = maximum(sums.factor_max, highest(factor_max));
    sums.tokens += end - begin;
}

inline void policy_loss(const LossTokens& tokens, float* grad_logp, LossSums& sums) {
    if (tokens.factors != nullptr && tokens.length > 0) sums.factors.origin = factor_origin(tokens.factors[0]);
    for (int64_t begin = 0; begin < tokens.length; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < tokens.length ? begin + kSumBlock : tokens.length;
        policy_loss_block(tokens, begin, end, grad_logp, sums);
    }
}
