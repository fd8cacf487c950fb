// Token shaping of one response. Include after weights_kernels.h, inside the vector's namespace.

inline Extremes extremes(const float* values, int64_t length) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    Vector low(kInfinity), high(-kInfinity);
    Mask finite = is_finite(Vector(0.0f));
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        const Vector value = load_first(values + i, lanes);
        low = minimum(low, in_lanes(lanes, value, kInfinity));
        high = maximum(high, in_lanes(lanes, value, -kInfinity));
        finite = finite & is_finite(value);
    }
    return {lowest(low), highest(high), !any(!finite)};
}

inline int64_t fixed_total(const float* values, int64_t length, double scale) {
    FixedSum total(scale);
    for (int64_t i = 0; i < length; i += Vector::kWidth) total.add(load_first(values + i, lanes_of(i, length)));
    return total.value();
}

inline Vector normalized_in(Vector value, const Extremes& range, float floor) {
    return vgpo::normalized_in(value, range.low, range.high, floor);
}

inline void scale_by(float* values, int64_t length, float factor) {
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        store_first(values + i, load_first(values + i, lanes) * Vector(factor), lanes);
    }
}

inline void softmax_weights(const ResponseSignals& signals, const ShapingConfig& config, float* weights) {
    const int64_t length = signals.length;
    const bool gated = config.gates_by_entropy();
    float mean = 0.0f;
    if (gated) {
        FixedSum sum(kUnitScale);
        for (int64_t i = 0; i < length; i += Vector::kWidth) {
            const int lanes = lanes_of(i, length);
            const Vector mixed =
                normalized_in(load_first(signals.visual + i, lanes), signals.visual_range, config.range_floor) +
                normalized_in(load_first(signals.entropy + i, lanes), signals.entropy_range, config.range_floor);
            store_first(weights + i, mixed, lanes);
            sum.add(in_lanes(lanes, mixed, 0.0f));
        }
        mean = mean_from_fixed(sum.value(), kUnitScale, length);
    }
    Vector largest(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        const Vector mixed = gated ? load_first(weights + i, lanes) : Vector(0.0f);
        const Vector power = softmax_power(load_first(signals.visual + i, lanes), mixed, mean, config);
        store_first(weights + i, power, lanes);
        largest = maximum(largest, in_lanes(lanes, power, -std::numeric_limits<float>::infinity()));
    }
    const Vector most(highest(largest));
    FixedSum total(kUnitScale);
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        const Vector share = exponential(load_first(weights + i, lanes) - most);
        store_first(weights + i, share, lanes);
        total.add(in_lanes(lanes, share, 0.0f));
    }
    scale_by(weights, length, static_cast<float>(length) / from_fixed(total.value(), kUnitScale));
}

inline void gate_weights(const ResponseSignals& signals, const ShapingConfig& config, float* weights) {
    const int64_t length = signals.length;
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        store_first(weights + i, gated_signal(load_first(signals.visual + i, lanes), config), lanes);
    }
    const Extremes range = extremes(weights, length);
    Vector largest(0.0f);
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, length);
        const Vector unit = normalized_in(load_first(weights + i, lanes), range, config.range_floor);
        const Vector weight = gate_weight(unit, config);
        store_first(weights + i, weight, lanes);
        largest = maximum(largest, in_lanes(lanes, weight, 0.0f));
    }
    if (!config.conserve) return;
    const double scale = fixed_scale_of(highest(largest));
    const float mass = from_fixed(fixed_total(weights, length, scale), scale);
    if (mass > kMassFloor) return scale_by(weights, length, static_cast<float>(length) / mass);
    std::fill_n(weights, length, 1.0f);
}

inline void visual_scores(const ResponseSignals& signals, const ShapingConfig& config, float* scores) {
    for (int64_t i = 0; i < signals.length; i += Vector::kWidth) {
        const int lanes = lanes_of(i, signals.length);
        Vector score = load_first(signals.visual + i, lanes);
        if (config.fuses()) {
            const Vector gap =
                normalized_in(load_first(signals.gap + i, lanes), signals.gap_range, config.range_floor);
            score = soft_or(normalized_in(score, signals.visual_range, config.range_floor), gap, config);
        }
        if (config.times_entropy) {
            const Vector entropy = load_first(signals.entropy + i, lanes);
            score = score * normalized_in(entropy, signals.entropy_range, config.range_floor);
        }
        store_first(scores + i, score, lanes);
    }
}
