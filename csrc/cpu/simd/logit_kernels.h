// Statistics of logits and their gradients, a row at a time. Include after vector_math.h, inside the vector's
// namespace.

// Logits whose lane sums are folded at a time, and that a row's gradient is computed in before it is stored.
constexpr int64_t kLogitBlock = 256;
// Behind this, e^x is zero. A finite bound keeps zero times the distance from being NaN.
constexpr float kFarthestLogit = -128.0f;

// Calls visit(column, logits, lanes) over [begin, end), where logits are (products + bias) * factor. The last ones may
// be fewer than a register holds: the lanes behind them are undefined.
template <typename Visit>
inline void for_logits(const float* products, const float* bias, int64_t begin, int64_t end, Vector factor,
                       const Visit& visit) {
    int64_t column = begin;
    if (bias == nullptr) {
        for (; column + Vector::kWidth <= end; column += Vector::kWidth) {
            visit(column, load(products + column) * factor, Vector::kWidth);
        }
    } else {
        for (; column + Vector::kWidth <= end; column += Vector::kWidth) {
            visit(column, (load(products + column) + load(bias + column)) * factor, Vector::kWidth);
        }
    }
    if (column < end) {
        const int lanes = lanes_of(column, end);
        const Vector product = load_first(products + column, lanes);
        visit(column, (bias == nullptr ? product : product + load_first(bias + column, lanes)) * factor, lanes);
    }
}

// Capped logits of products [begin, end), and the slopes of the cap there where `slopes` is not null.
inline void cap_block(const float* products, const float* bias, int64_t begin, int64_t end, const LogitMap& map,
                      float* logits, float* slopes) {
    const Vector factor(map.factor);
    for_logits(products, bias, begin, end, Vector(map.squeeze), [&](int64_t column, Vector squeezed, int) {
        const Vector bounded = hyperbolic_tangent(squeezed);
        store(logits + (column - begin), bounded * factor);
        if (slopes != nullptr) store(slopes + (column - begin), slope_of_cap(bounded));
    });
}

// Takes at most kLogitBlock logits into a row's statistics.
template <bool kSquares>
inline void block_statistics(const float* products, const float* bias, int64_t columns, Vector factor,
                             LogitStatistics& statistics, float* of_row) {
    const Vector farthest(kFarthestLogit), nothing(-std::numeric_limits<float>::infinity());
    Vector largest = nothing;
    for_logits(products, bias, 0, columns, factor, [&](int64_t, Vector logits, int lanes) {
        if (lanes < Vector::kWidth) logits = select(first_lanes(lanes), logits, nothing);
        largest = maximum(logits, largest);
    });
    const float shift = maximum(highest(largest), statistics.maximum);
    if (shift == -std::numeric_limits<float>::infinity()) {
        // A bias may forbid every entry seen so far: there is nothing to measure distances from. But a comparison
        // passes over a NaN, and a sum does not.
        Vector all(0.0f);
        for_logits(products, bias, 0, columns, factor, [&](int64_t, Vector logits, int lanes) {
            all = all + (lanes < Vector::kWidth ? select(first_lanes(lanes), logits, nothing) : logits);
        });
        if (sum(all) != sum(all)) statistics.total = sum(all);
        return;
    }
    const Vector origin(shift);
    Vector total(0.0f), weighted(0.0f), squares(0.0f);
    for_logits(products, bias, 0, columns, factor, [&](int64_t, Vector logits, int lanes) {
        const Vector distance = logits - origin;
        Vector share = exponential(distance);
        if (lanes < Vector::kWidth) share = select(first_lanes(lanes), share, Vector(0.0f));
        total = total + share;
        weighted = multiply_add(share, maximum(distance, farthest), weighted);
        if constexpr (kSquares) squares = multiply_add(share, share, squares);
    });
    if constexpr (kSquares) *of_row = *of_row * expf(2.0f * (statistics.maximum - shift)) + sum(squares);
    statistics.merge({shift, sum(total), sum(weighted)});
}

template <bool kSquares>
void logit_statistics(const float* products, const float* bias, int64_t columns, const LogitMap& map,
                      LogitStatistics& statistics, float* squares) {
    float capped[kLogitBlock];
    for (int64_t begin = 0; begin < columns; begin += kLogitBlock) {
        const int64_t end = begin + kLogitBlock < columns ? begin + kLogitBlock : columns;
        // One call, so that the compiler puts it in place.
        const bool is_capped = map.capped();
        if (is_capped) cap_block(products, bias, begin, end, map, capped, nullptr);
        block_statistics<kSquares>(is_capped ? capped : products + begin, is_capped || !bias ? nullptr : bias + begin,
                                   end - begin, Vector(is_capped ? 1.0f : map.factor), statistics, squares);
    }
}

inline void store_gradient(const float* values, int64_t count, float* gradient) {
    std::memcpy(gradient, values, static_cast<size_t>(count) * sizeof(float));
}

// Rounds to nearest even. The compiler makes vector code of it.
inline void store_gradient(const float* values, int64_t count, BFloat16* gradient) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        const uint32_t rounded_bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        // Rounding would carry the payload of a NaN into the sign.
        gradient[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded_bits);
    }
}

template <typename T>
void logit_gradient(const float* products, const float* bias, int64_t columns, const LogitMap& map,
                    const LogitGradient& row, void* gradient) {
    const Vector farthest(kFarthestLogit);
    const Vector origin(row.maximum), log_sum(row.log_sum), level(row.scale), slope(row.slope);
    T* const out = static_cast<T*>(gradient);
    // `gradient` may be the products' own memory: a block is stored when all of it has been read, and never past it.
    float block[kLogitBlock], slopes[kLogitBlock];
    const auto turn = [&](const float* values, const float* offsets, int64_t begin, int64_t end, Vector factor) {
        for_logits(values, offsets, begin, end, factor, [&](int64_t column, Vector logits, int) {
            const Vector log_probability = logits - origin - log_sum;
            const Vector level_and_slope = multiply_add(slope, maximum(log_probability, farthest), level);
            store(block + (column - begin), exponential(log_probability) * level_and_slope);
        });
    };
    for (int64_t begin = 0; begin < columns; begin += kLogitBlock) {
        const int64_t end = begin + kLogitBlock < columns ? begin + kLogitBlock : columns;
        if (map.capped()) {
            cap_block(products, bias, begin, end, map, block, slopes);
            turn(block, nullptr, 0, end - begin, Vector(1.0f));
        } else {
            turn(products, bias, begin, end, Vector(map.factor));
        }
        if (begin <= row.target && row.target < end) block[row.target - begin] += row.at_target;
        if (map.capped()) {
            for (int64_t i = 0; i < end - begin; ++i) block[i] *= slopes[i];
        }
        store_gradient(block, end - begin, out + begin);
    }
}
