// Compensation and intra-trajectory re-weighting of one response. Include after vector_math.h, inside the vector's
// namespace.

inline Vector in_lanes(int lanes, Vector v, float elsewhere) {
    return lanes == Vector::kWidth ? v : select(first_lanes(lanes), v, Vector(elsewhere));
}

inline bool all_signals(const float* cos, int64_t length) {
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        if (any(!is_signal(load_first(cos + i, lanes_of(i, length))))) return false;
    }
    return true;
}

inline float smallest(const float* values, int64_t length) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    Vector result(kInfinity);
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        result = minimum(result, in_lanes(lanes, load_first(values + i, lanes), kInfinity));
    }
    return lowest(result);
}

// The k-th largest of `length` >= k >= 1 floats, by fixing the bits of its order key from the top: the largest
// key that at least k keys reach. 32 counting passes over a tail in cache beat any selection that branches.
inline float kth_largest(const float* values, int64_t length, int64_t k, int32_t* keys) {
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        store(keys + i, order_keys(in_lanes(lanes, load_first(values + i, lanes), -INFINITY)));
    }
    uint32_t found = 0;  // the key plus 2^31, so that bits order as an unsigned number
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
        const int32_t candidate = static_cast<int32_t>((found | bit) ^ 0x80000000u);
        int64_t reached = 0;
        for (int64_t i = 0; i < length; i += Vector::kWidth) reached += count_at_least(keys + i, candidate);
        if (reached >= k) found |= bit;
    }
    return order_key_value(static_cast<int32_t>(found ^ 0x80000000u));
}

inline ResponseWeights response_weights(const float* cos, int64_t first, int64_t length, float offset,
                                        const WeightsConfig& config, int32_t* keys, float* w, float* psi) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    ResponseWeights result = {};
    int64_t gate_first = 0;
    float threshold = -kInfinity;
    if (config.gate) {
        gate_first = tail_first(length, config) < first ? first : tail_first(length, config);
        const int64_t tail = length - gate_first;
        threshold = tail > 0 ? kth_largest(cos + gate_first, tail, tail_top_count(tail, config), keys) : kInfinity;
    }

    const Vector zero(0.0f), gate_from(static_cast<float>(gate_first));
    const float late_from = static_cast<float>((length + 1) / 2);
    Vector smallest(kInfinity), largest(-kInfinity);
    FixedSum weights(config.weight_scale);
    const Ramp ramp = ramp_of(length, config);
    for (int64_t begin = first; begin < length; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < length ? begin + kSumBlock : length;
        Vector cos_sum(0.0f), early_sum(0.0f), late_sum(0.0f);
        for (int64_t i = begin; i < end; i += Vector::kWidth) {
            const int lanes = lanes_of(i, end);
            const Mask present = first_lanes(lanes);
            const Vector value = load_first(cos + i, lanes), ordinal = ordinals_from(static_cast<float>(i));
            const Vector rho = select(present, focus_score(value, offset, config), zero);
            const Mask gate = present & (ordinal >= gate_from) & (value >= Vector(threshold));
            const Vector weight = compensated_weight(rho, select(gate, compensation(ordinal, ramp, config), zero));
            store_first(w + i, weight, lanes);
            smallest = minimum(smallest, in_lanes(lanes, weight, kInfinity));
            largest = maximum(largest, in_lanes(lanes, weight, -kInfinity));
            weights.add(weight);
            result.gated += count(gate);
            cos_sum = cos_sum + value;
            const Mask late = ordinal >= Vector(late_from);
            early_sum = early_sum + select(late, zero, rho);
            late_sum = late_sum + select(late, rho, zero);
        }
        result.cos_sum += sum(cos_sum);
        result.early_sum += sum(early_sum);
        result.late_sum += sum(late_sum);
    }

    const float low = lowest(smallest), high = highest(largest);
    FixedSum normalized(kUnitScale);
    for (int64_t i = first; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        const Vector value = min_max_normalized(load_first(w + i, lanes), low, high);
        store_first(psi + i, value, lanes);
        normalized.add(in_lanes(lanes, value, 0.0f));
    }
    const Vector mean(mean_from_fixed(normalized.value(), kUnitScale, length - first));
    for (int64_t i = first; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        store_first(psi + i, config.intra ? load_first(psi + i, lanes) - mean : zero, lanes);
    }
    result.score = accumulated_score(weights.value(), normalized.value(), length - first, config);
    return result;
}

inline void factors(const float* psi, int64_t length, float phi, const WeightsConfig& config, float* factors) {
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        store_first(factors + i, advantage_factor(load_first(psi + i, lanes), phi, config), lanes);
    }
}
