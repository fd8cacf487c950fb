// Epilogues of an LM head's matrix products for two views of every token: sums of divergences, and the gradient in
// place.
//
// A block goes over both rows of a pair together, once: 8 bytes read the two logits of an entry for the sums, and for
// the gradient as many are written in fp32, half in 16 bits. For 4,096 pairs of 152,064 logits that is 5.0 GB and 7.5
// GB, where the product of that shape at D = 3584 takes 8.9 TFLOP. An entry takes two exponentials, those of half the
// distances: their squares and their product are all that sums need. Shares need a third and a logarithm.
#pragma once

#include "../logit_statistics.h"
#include "linear_logprob.cuh"

namespace vgpo {
namespace cuda {

// By default a chunk of thousands of pairs has 4,608 columns or so, and a pass 2,048: with more threads most of the last
// pass would lie behind the end.
constexpr int kPairThreads = 128;

// The pairs of a chunk, as the rows of each view: those of hidden's are the even rows of the products.
struct PairRows {
    HeadRows view[2];  // a row of each is one of a pair
};

// A pass of the block over both rows of a pair. The first one's alignment decides which columns form a vector; where
// the other one's differs, that is read and written by element.
struct PairPass {
    HeadPass pass, other;
    bool together;

    __device__ PairPass(int64_t begin, int columns, bool aligned)
        : pass(begin, columns), other(pass), together(aligned) {
        other.whole = pass.whole && together;
    }

    // Products plus bias of both; -infinity outside the row. In a whole pass no branch stands between the loads.
    __device__ __forceinline__ void load(const PairRows& rows, const float* const (&row)[2],
                                         float (&p)[kHeadVectors][4], float (&q)[kHeadVectors][4]) const {
        float4 fours[kHeadVectors], other_fours[kHeadVectors];
        if (other.whole) {
            pass.fetch<true>(rows.view[0], row[0], fours);
            other.fetch<true>(rows.view[1], row[1], other_fours);
        } else {
            pass.fetch<false>(rows.view[0], row[0], fours);
            other.fetch<false>(rows.view[1], row[1], other_fours, together);
        }
        pass.unpack(rows.view[0], fours, p);
        other.unpack(rows.view[1], other_fours, q);
    }
};

// share * (own - other), and nothing where there is no share: both may be infinitely far away.
__device__ __forceinline__ float apart(float share, float own, float other) {
    return share > 0.0f ? share * (own - other) : 0.0f;
}

// Calls body(pass, p, q) with the logits of both rows of a pair, pass by pass.
template <bool kCapped, typename Body>
__device__ __forceinline__ void for_each_pass(const PairRows& rows, int64_t pair, const LogitMap& map, Body body) {
    const float* const row[2] = {rows.view[0].row(pair), rows.view[1].row(pair)};
    const int columns = rows.view[0].columns, before = misalignment(row[0]);
    const bool together = before == misalignment(row[1]);
    for (int64_t begin = -before; begin < columns; begin += kHeadVectors * 4 * blockDim.x) {
        float p[kHeadVectors][4], q[kHeadVectors][4];
        const PairPass pass(begin, columns, together);
        pass.load(rows, row, p, q);
        to_logits<kCapped>(pass.pass, columns, map, p);
        to_logits<kCapped>(pass.pass, columns, map, q);
        body(p, q);
    }
}

// ---- statistics ------------------------------------------------------------------------------------------------

// Of both views, over the threads of a block.
struct PairMaxima {
    float of[2];

    __device__ static PairMaxima identity() { return {{-INFINITY, -INFINITY}}; }
    __device__ void merge(const PairMaxima& other) {
        of[0] = fmaxf(of[0], other.of[0]);
        of[1] = fmaxf(of[1], other.of[1]);
    }
};

template <int kCount>
struct Sums {
    float of[kCount];

    __device__ static Sums identity() { return {}; }
    __device__ void merge(const Sums& other) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) of[i] += other.of[i];
    }
};

// What every thread has seen, measured from the block's largest logits; complete in the first warp.
__device__ inline PairStatistics of_block(PairStatistics own) {
    const PairMaxima maxima = block_reduce(PairMaxima{{own.view[0].maximum, own.view[1].maximum}});
    own = own.moved_to(maxima.of[0], maxima.of[1]);
    const Sums<7> sums = reduce_to_first_warp(Sums<7>{{own.view[0].total, own.view[0].weighted, own.view[1].total,
                                                       own.view[1].weighted, own.distance[0], own.distance[1],
                                                       own.root}});
    own.view[0].total = sums.of[0];
    own.view[0].weighted = sums.of[1];
    own.view[1].total = sums.of[2];
    own.view[1].weighted = sums.of[3];
    own.distance[0] = sums.of[4];
    own.distance[1] = sums.of[5];
    own.root = sums.of[6];
    return own;
}

struct PairStatisticsArguments {
    PairRows rows;
    float* sums;  // [11, n], updated: maximum, total, weighted and target of each view, distances, root
    int64_t sums_stride;
};

template <int kBlockThreads, bool kCapped>
__global__ void __launch_bounds__(kBlockThreads)
    pair_statistics_kernel(const __grid_constant__ PairStatisticsArguments arguments) {
    const PairRows& rows = arguments.rows;
    const int64_t pair = blockIdx.x;
    const LogitMap map = rows.view[0].maps.of_row(pair);
    PairStatistics own;
    for_each_pass<kCapped>(rows, pair, map, [&](const auto& p, const auto& q) {
        float largest = own.view[0].maximum, other_largest = own.view[1].maximum;
        HeadPass::each([&](int i, int j) {
            largest = fmaxf(largest, p[i][j]);
            other_largest = fmaxf(other_largest, q[i][j]);
        });
        own = own.moved_to(largest, other_largest);
        own.view[0].maximum = largest;
        own.view[1].maximum = other_largest;
        // A bias may forbid every entry: there is nothing to measure distances from.
        const float origin = origin_of(largest), other_origin = origin_of(other_largest);
        HeadPass::each([&](int i, int j) {
            const float a = p[i][j] - origin, b = q[i][j] - other_origin;
            // Exponentials of half give those of the whole and of their mean.
            const float half_a = expf(0.5f * a), half_b = expf(0.5f * b);
            const float share = half_a * half_a, other_share = half_b * half_b;
            own.view[0].total += share;
            own.view[0].weighted = fmaf(share, fmaxf(a, kFarthestLogit), own.view[0].weighted);
            own.distance[0] += apart(share, a, b);
            own.view[1].total += other_share;
            own.view[1].weighted = fmaf(other_share, fmaxf(b, kFarthestLogit), own.view[1].weighted);
            own.distance[1] += apart(other_share, b, a);
            own.root = fmaf(half_a, half_b, own.root);
        });
    });
    own = of_block(own);
    if (threadIdx.x != 0) return;
    float* running = arguments.sums + pair;
    const int64_t stride = arguments.sums_stride;
    PairStatistics all;
    for (int view = 0; view < 2; ++view) {
        const float* of_view = running + 4 * view * stride;
        all.view[view].maximum = of_view[0];
        all.view[view].total = of_view[stride];
        all.view[view].weighted = of_view[2 * stride];
        all.distance[view] = running[(8 + view) * stride];
    }
    all.root = running[10 * stride];
    all.merge(own);
    for (int view = 0; view < 2; ++view) {
        float* of_view = running + 4 * view * stride;
        of_view[0] = all.view[view].maximum;
        of_view[stride] = all.view[view].total;
        of_view[2 * stride] = all.view[view].weighted;
        running[(8 + view) * stride] = all.distance[view];
        const HeadRows& of_rows = rows.view[view];
        const int target = of_rows.target(pair);
        if (target >= 0) of_view[3 * stride] = map.logit(of_rows.offset_product(of_rows.row(pair), target));
    }
    running[10 * stride] = all.root;
}

// ---- shares ----------------------------------------------------------------------------------------------------

// log m - log p and log m - log q of the mixture m of two probabilities, from their logarithms x and y.
struct ToMixture {
    float own, other;

    __device__ __forceinline__ ToMixture(float x, float y, float beta) {
        const float difference = y - x;
        const bool other_is_larger = difference > 0.0f;
        // The smaller one over the larger; m over the larger lies between beta and one.
        const float ratio = expf(-fabsf(difference)), rest = 1.0f - beta;
        const float log = logf(other_is_larger ? fmaf(beta, ratio, rest) : fmaf(rest, ratio, beta));
        own = log + (other_is_larger ? difference : 0.0f);
        other = log - (other_is_larger ? 0.0f : difference);
    }
};

// 1 where the first is larger, -1 where the second is, 0 where neither is.
__device__ __forceinline__ float sign_of(float x, float y) { return x > y ? 1.0f : y > x ? -1.0f : 0.0f; }

// Those of a pair, from [4, n].
__device__ inline PairNormalisers normalisers_of(const float* values, int64_t stride, int64_t pair) {
    const float* own = values + pair;
    return {{own[0], own[2 * stride]}, {own[stride], own[3 * stride]}};
}

// The log-probability of a logit. A NaN is kept.
__device__ __forceinline__ float log_probability(float logit, const PairNormalisers& totals, int view) {
    return maximum(logit - totals.maximum[view] - totals.log_sum[view], kFarthestLogit);
}

struct PairSharesArguments {
    PairRows rows;
    const float* totals;  // [4, n]: maximum and log-sum of both views
    int64_t totals_stride;
    float js_beta;
    float* sums;  // [4, n], updated: js, tv, js_p, sign_p
    int64_t sums_stride;
};

template <int kBlockThreads, bool kCapped>
__global__ void __launch_bounds__(kBlockThreads)
    pair_shares_kernel(const __grid_constant__ PairSharesArguments arguments) {
    const PairRows& rows = arguments.rows;
    const int64_t pair = blockIdx.x;
    const PairNormalisers totals = normalisers_of(arguments.totals, arguments.totals_stride, pair);
    const float beta = arguments.js_beta;
    float js_p = 0.0f, js_q = 0.0f, tv = 0.0f, signs = 0.0f;
    for_each_pass<kCapped>(rows, pair, rows.view[0].maps.of_row(pair), [&](const auto& p, const auto& q) {
        HeadPass::each([&](int i, int j) {
            const float x = log_probability(p[i][j], totals, 0), y = log_probability(q[i][j], totals, 1);
            const float share = expf(x), other_share = expf(y);
            const ToMixture away(x, y, beta);
            js_p = fmaf(-share, away.own, js_p);
            js_q = fmaf(-other_share, away.other, js_q);
            tv += fabsf(share - other_share);
            signs = fmaf(share, sign_of(x, y), signs);
        });
    });
    const Sums<4> sums = reduce_to_first_warp(Sums<4>{{js_p, js_q, tv, signs}});
    if (threadIdx.x != 0) return;
    float* running = arguments.sums + pair;
    const int64_t stride = arguments.sums_stride;
    running[0] += beta * sums.of[0] + (1.0f - beta) * sums.of[1];
    running[stride] += 0.5f * sums.of[2];
    running[2 * stride] += sums.of[0];
    running[3 * stride] += sums.of[3];
}

// ---- gradient --------------------------------------------------------------------------------------------------

struct PairGradientArguments {
    PairRows rows;
    const float* coefficients;  // [20, n]: maximum and log-sum of both views, c0 to c7 of each
    int64_t coefficients_stride;
    float js_beta;
};

__device__ inline ViewGradient view_gradient(const float* c, int64_t stride) {
    return {c[0],          c[stride],     c[2 * stride], c[3 * stride],
            c[4 * stride], c[5 * stride], c[6 * stride], c[7 * stride]};
}

// What all coefficients but those of shares and of the target make of an entry.
__device__ __forceinline__ float gradient_of(const ViewGradient& c, float own, float other, float share,
                                             float other_share, float root) {
    const float inner = fmaf(c.difference, own - other, fmaf(c.own, own, c.constant));
    return fmaf(share, inner, fmaf(c.cross, other_share, c.root * root));
}

// Turns both rows of a pair into their gradients, of type T, each from its row's beginning on.
template <typename T, bool kCapped>
__global__ void __launch_bounds__(kPairThreads)
    pair_gradient_kernel(const __grid_constant__ PairGradientArguments arguments) {
    const PairRows& rows = arguments.rows;
    const int64_t pair = blockIdx.x, stride = arguments.coefficients_stride;
    const LogitMap map = rows.view[0].maps.of_row(pair);
    const PairNormalisers totals = normalisers_of(arguments.coefficients, stride, pair);
    const float* of_pair = arguments.coefficients + pair;
    const ViewGradient c = view_gradient(of_pair + 4 * stride, stride), d = view_gradient(of_pair + 12 * stride, stride);
    const bool shares = c.reads_shares() || d.reads_shares();
    const float* const row[2] = {rows.view[0].row(pair), rows.view[1].row(pair)};
    const int columns = rows.view[0].columns, before = misalignment(row[0]), target = rows.view[0].target(pair);
    const bool together = before == misalignment(row[1]);
    // Narrow vectors of a row that lies askew are askew as well.
    const bool vectors = before == 0 || sizeof(T) == sizeof(float);
    for (int64_t begin = -before; begin < columns; begin += kHeadVectors * 4 * blockDim.x) {
        const PairPass pass(begin, columns, together);
        float p[kHeadVectors][4], q[kHeadVectors][4];
        pass.load(rows, row, p, q);
        // Where the target lies from this thread's first column on: 32 bits are enough for a pass.
        const int64_t distance = target - pass.pass.own;
        const int place = distance >= 0 && distance < kHeadVectors * pass.pass.step ? static_cast<int>(distance) : -1;
        const auto differentiate = [&](auto with_shares) {
            HeadPass::each([&](int i, int j) {
                float bounded = p[i][j], other_bounded = q[i][j];
                if constexpr (kCapped) {
                    bounded = hyperbolic_tangent(bounded * map.squeeze);
                    other_bounded = hyperbolic_tangent(other_bounded * map.squeeze);
                }
                const float x = log_probability(bounded * map.factor, totals, 0);
                const float y = log_probability(other_bounded * map.factor, totals, 1);
                const float half_x = expf(0.5f * x), half_y = expf(0.5f * y);
                const float share = half_x * half_x, other_share = half_y * half_y, root = half_x * half_y;
                float own = gradient_of(c, x, y, share, other_share, root);
                float other = gradient_of(d, y, x, other_share, share, root);
                if constexpr (decltype(with_shares)::value) {
                    const ToMixture away(x, y, arguments.js_beta);
                    const float sign = sign_of(x, y);
                    own = fmaf(share, fmaf(c.sign, sign, -c.mixture * away.own), own);
                    other = fmaf(other_share, fmaf(d.sign, sign, -d.mixture * away.other), other);
                }
                const bool at_target = i * pass.pass.step + j == place;
                own += at_target ? c.at_target : 0.0f;
                other += at_target ? d.at_target : 0.0f;
                if constexpr (kCapped) {
                    own *= slope_of_cap(bounded);
                    other *= slope_of_cap(other_bounded);
                }
                p[i][j] = own;
                q[i][j] = other;
            });
        };
        if (shares) differentiate(std::true_type());
        else differentiate(std::false_type());
        // Narrow numbers take the place of wide ones that other threads may still have to read, but only of this pass:
        // those behind it are never reached.
        __syncthreads();
        store_pass(pass.pass, reinterpret_cast<T*>(rows.view[0].row(pair)), columns, vectors, p);
        store_pass(pass.other, reinterpret_cast<T*>(rows.view[1].row(pair)), columns, vectors && together, q);
    }
}

}  // namespace cuda
}  // namespace vgpo
