// Two views' logits of a token side by side: sums of their divergences, and their gradients. Include after
// logit_kernels.h, inside the vector's namespace.

// Logits of a block of one view.
struct LogitBlock {
    float values[kLogitBlock];
    float slopes[kLogitBlock];  // of the cap

    // Takes columns [begin, end) of a row; without a cap, slopes are not written.
    void fill(const float* products, const float* bias, int64_t begin, int64_t end, const LogitMap& map) {
        if (map.capped()) {
            cap_block(products, bias, begin, end, map, values, slopes);
            return;
        }
        for_logits(products, bias, begin, end, Vector(map.factor),
                   [&](int64_t column, Vector logits, int) { store(values + (column - begin), logits); });
    }

    // The largest of the first `count`. A comparison passes over a NaN.
    float largest(int64_t count) const {
        const Vector nothing(-std::numeric_limits<float>::infinity());
        Vector found = nothing;
        for (int64_t i = 0; i < count; i += Vector::kWidth) {
            const int lanes = lanes_of(i, count);
            const Vector logits = load(values + i);
            found = maximum(lanes < Vector::kWidth ? select(first_lanes(lanes), logits, nothing) : logits, found);
        }
        return highest(found);
    }
};

// Calls visit(index, of one view, of the other, lanes) for the first `count` logits of two blocks. Lanes behind the
// last are -infinity in both.
template <typename Visit>
inline void for_pairs(const LogitBlock& p, const LogitBlock& q, int64_t count, const Visit& visit) {
    const Vector nothing(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < count; i += Vector::kWidth) {
        const int lanes = lanes_of(i, count);
        Vector own = load(p.values + i), other = load(q.values + i);
        if (lanes < Vector::kWidth) {
            own = select(first_lanes(lanes), own, nothing);
            other = select(first_lanes(lanes), other, nothing);
        }
        visit(i, own, other, lanes);
    }
}

// share * (own - other), and nothing where there is no share: both may be infinitely far away.
inline Vector apart(Vector share, Vector own, Vector other) {
    return select(share > Vector(0.0f), share * (own - other), Vector(0.0f));
}

inline void pair_statistics(const PairRow& row, int64_t columns, PairStatistics& statistics) {
    const Vector half(0.5f), farthest(kFarthestLogit);
    LogitBlock p, q;
    for (int64_t begin = 0; begin < columns; begin += kLogitBlock) {
        const int64_t end = begin + kLogitBlock < columns ? begin + kLogitBlock : columns;
        p.fill(row.products[0], row.bias[0], begin, end, row.map);
        q.fill(row.products[1], row.bias[1], begin, end, row.map);
        PairStatistics block;
        block.view[0].maximum = maximum(p.largest(end - begin), statistics.view[0].maximum);
        block.view[1].maximum = maximum(q.largest(end - begin), statistics.view[1].maximum);
        // A bias may forbid every entry seen so far: there is nothing to measure distances from.
        const Vector origin(origin_of(block.view[0].maximum)), other_origin(origin_of(block.view[1].maximum));
        Vector total(0.0f), weighted(0.0f), distance(0.0f);
        Vector other_total(0.0f), other_weighted(0.0f), other_distance(0.0f), root(0.0f);
        for_pairs(p, q, end - begin, [&](int64_t, Vector logits, Vector other_logits, int) {
            const Vector a = logits - origin, b = other_logits - other_origin;
            // Exponentials of half give those of the whole and of their mean.
            const Vector half_a = exponential(a * half), half_b = exponential(b * half);
            const Vector share = half_a * half_a, other_share = half_b * half_b;
            total = total + share;
            weighted = multiply_add(share, maximum(a, farthest), weighted);
            distance = distance + apart(share, a, b);
            other_total = other_total + other_share;
            other_weighted = multiply_add(other_share, maximum(b, farthest), other_weighted);
            other_distance = other_distance + apart(other_share, b, a);
            root = multiply_add(half_a, half_b, root);
        });
        block.view[0].total = sum(total);
        block.view[0].weighted = sum(weighted);
        block.view[1].total = sum(other_total);
        block.view[1].weighted = sum(other_weighted);
        block.distance[0] = sum(distance);
        block.distance[1] = sum(other_distance);
        block.root = sum(root);
        statistics.merge(block);
    }
}

// log m - log p and log m - log q of the mixture m of two probabilities, from their logarithms x and y.
struct ToMixture {
    Vector own, other;
};

inline ToMixture to_mixture(Vector x, Vector y, Vector beta, Vector rest) {
    const Vector zero(0.0f), difference = y - x;
    const Mask other_is_larger = difference > zero;
    // The smaller one over the larger; m over the larger lies between beta and one.
    const Vector ratio = exponential(minimum(difference, zero - difference));
    const Vector of_larger = select(other_is_larger, multiply_add(beta, ratio, rest), multiply_add(rest, ratio, beta));
    const Vector log = logarithm(of_larger);
    return {log + select(other_is_larger, difference, zero), log - select(other_is_larger, zero, difference)};
}

// 1 where the first is larger, -1 where the second is, 0 where neither is.
inline Vector sign_of(Vector x, Vector y) {
    return select(x > y, Vector(1.0f), select(y > x, Vector(-1.0f), Vector(0.0f)));
}

inline void pair_shares(const PairRow& row, int64_t columns, const PairNormalisers& totals, float js_beta,
                        PairShares& shares) {
    const Vector farthest(kFarthestLogit), beta(js_beta), rest(1.0f - js_beta), zero(0.0f);
    const Vector origin(totals.maximum[0]), log_sum(totals.log_sum[0]);
    const Vector other_origin(totals.maximum[1]), other_log_sum(totals.log_sum[1]);
    LogitBlock first, second;
    for (int64_t begin = 0; begin < columns; begin += kLogitBlock) {
        const int64_t end = begin + kLogitBlock < columns ? begin + kLogitBlock : columns;
        first.fill(row.products[0], row.bias[0], begin, end, row.map);
        second.fill(row.products[1], row.bias[1], begin, end, row.map);
        Vector js_p(0.0f), js_q(0.0f), tv(0.0f), signs(0.0f);
        for_pairs(first, second, end - begin, [&](int64_t, Vector logits, Vector other_logits, int) {
            const Vector x = maximum(logits - origin - log_sum, farthest);
            const Vector y = maximum(other_logits - other_origin - other_log_sum, farthest);
            const Vector p = exponential(x), q = exponential(y), difference = p - q;
            const ToMixture away = to_mixture(x, y, beta, rest);
            js_p = js_p - p * away.own;
            js_q = js_q - q * away.other;
            tv = tv + maximum(difference, zero - difference);
            signs = multiply_add(p, sign_of(x, y), signs);
        });
        const float of_p = sum(js_p), of_q = sum(js_q);
        shares.js += js_beta * of_p + (1.0f - js_beta) * of_q;
        shares.tv += 0.5f * sum(tv);
        shares.js_p += of_p;
        shares.sign_p += sum(signs);
    }
}

// Writes the gradients of both views, in float or BFloat16; they may take the products' place.
template <typename T>
void pair_gradient(const PairRow& row, int64_t columns, const PairNormalisers& totals, const PairGradient& gradient,
                   float js_beta) {
    const Vector half(0.5f), farthest(kFarthestLogit), beta(js_beta), rest(1.0f - js_beta);
    const Vector origin(totals.maximum[0]), log_sum(totals.log_sum[0]);
    const Vector other_origin(totals.maximum[1]), other_log_sum(totals.log_sum[1]);
    const bool shares = gradient.view[0].reads_shares() || gradient.view[1].reads_shares();
    LogitBlock p, q;
    const auto of_view = [&](const ViewGradient& c, Vector own, Vector share, Vector other, Vector other_share,
                             Vector root) {
        Vector inner = multiply_add(Vector(c.own), own, Vector(c.constant));
        inner = multiply_add(Vector(c.difference), own - other, inner);
        return multiply_add(share, inner, multiply_add(Vector(c.cross), other_share, Vector(c.root) * root));
    };
    for (int64_t begin = 0; begin < columns; begin += kLogitBlock) {
        const int64_t end = begin + kLogitBlock < columns ? begin + kLogitBlock : columns;
        p.fill(row.products[0], row.bias[0], begin, end, row.map);
        q.fill(row.products[1], row.bias[1], begin, end, row.map);
        for_pairs(p, q, end - begin, [&](int64_t i, Vector logits, Vector other_logits, int) {
            const Vector x = maximum(logits - origin - log_sum, farthest);
            const Vector y = maximum(other_logits - other_origin - other_log_sum, farthest);
            const Vector half_x = exponential(x * half), half_y = exponential(y * half);
            const Vector share = half_x * half_x, other_share = half_y * half_y, root = half_x * half_y;
            Vector own = of_view(gradient.view[0], x, share, y, other_share, root);
            Vector other = of_view(gradient.view[1], y, other_share, x, share, root);
            if (shares) {
                const ToMixture away = to_mixture(x, y, beta, rest);
                const Vector sign = sign_of(x, y);
                const ViewGradient &c = gradient.view[0], &d = gradient.view[1];
                own = own + share * (Vector(c.sign) * sign - Vector(c.mixture) * away.own);
                other = other + other_share * (Vector(d.sign) * sign - Vector(d.mixture) * away.other);
            }
            store(p.values + i, own);
            store(q.values + i, other);
        });
        LogitBlock* const blocks[2] = {&p, &q};
        for (int view = 0; view < 2; ++view) {
            float* const values = blocks[view]->values;
            if (begin <= row.target && row.target < end) {
                values[row.target - begin] += gradient.view[view].at_target;
            }
            if (row.map.capped()) {
                for (int64_t i = 0; i < end - begin; ++i) values[i] *= blocks[view]->slopes[i];
            }
            // The products' own memory: a block is stored when all of it has been read, and never past it.
            store_gradient(values, end - begin, static_cast<T*>(gradient.out[view]) + begin);
        }
    }
}
