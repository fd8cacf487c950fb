// Factors of responses from their scores, compared with those of their group or of the batch.
//
// A block looks at all scores two or three times, and four times more for each of two medians: for every response, or
// once for all of its responses where they are compared with the whole batch. Sums are 64-bit fixed-point numbers.
#pragma once

#include "../shaping_math.h"
#include "weigh_response.cuh"

namespace vgpo {
namespace cuda {

__device__ inline float largest_of(const Extremes& extremes) {
    return maximum(fabsf(extremes.low), fabsf(extremes.high));
}

// What a response's score is compared with: the finite scores of its group or of the batch.
struct Peers {
    const float* scores;       // [B], NaN for a response that is left out
    const int64_t* group_ids;  // [B]
    int batch;
    bool everyone;
    int64_t id;  // of the group

    __device__ bool has(int response, float score) const {
        return (everyone || group_ids[response] == id) && is_finite(score);
    }
};

__device__ inline Peers peers_of(const float* scores, const int64_t* group_ids, int64_t batch, int64_t response,
                                 const ShapingConfig& config) {
    const bool everyone = config.response_scope == ResponseScope::kBatch;
    return {scores, group_ids, static_cast<int>(batch), everyone, everyone ? 0 : group_ids[response]};
}

struct Comparison {
    float low, high;          // of scores
    float center, deviation;  // median and median absolute deviation, or mean and standard deviation
    float mean;               // of normalised scores, or of shares of the softmax
};

// Calls use(score) for this thread's share of the peers.
template <typename Use>
__device__ void for_each_peer(const Peers& peers, Use use) {
    for_each_loaded<2>(peers.batch, [&](int i) { return peers.scores[i]; }, [&](int i, float score) {
        if (peers.has(i, score)) use(score);
    });
}

struct PeerScan {
    Extremes scores;
    int32_t members;

    __device__ static PeerScan identity() { return {Extremes::identity(), 0}; }
    __device__ void merge(const PeerScan& other) {
        scores.merge(other.scores);
        members += other.members;
    }
};

__device__ inline PeerScan warp_reduce(const PeerScan& scan) {
    return {warp_reduce(scan.scores), warp_sum(scan.members)};
}

// A block looks at a response's peers.
__device__ inline Comparison compare(const Peers& peers, const ShapingConfig& config) {
    PeerScan scan = PeerScan::identity();
    for_each_peer(peers, [&](float score) { scan.merge({Extremes::of(score), 1}); });
    scan = block_reduce(scan);
    Comparison found{scan.scores.low, scan.scores.high, 0.0f, 0.0f, 0.0f};
    const int members = scan.members;
    if (members == 0) return found;
    const auto mean_of = [&](double scale, auto value) {
        int64_t sum = 0;
        for_each_peer(peers, [&](float score) { sum += to_fixed(value(score), scale); });
        return mean_from_fixed(block_sum(sum), scale, members);
    };
    if (config.response == ResponseWeight::kMinMax) {
        found.mean = mean_of(kUnitScale, [&](float score) { return min_max_unit(score, found.low, found.high); });
    } else if (config.response == ResponseWeight::kMedianMad) {
        // The lower of two medians, by its rank from above: those who are no peers come last.
        const int wanted = members - (members - 1) / 2;
#pragma unroll 1
        for (int round = 0; round < 2; ++round) {
            __syncthreads();  // for the histograms of the search before
            const float median = kth_largest(peers.batch, wanted, [&](int i) {
                const float score = peers.scores[i];
                return !peers.has(i, score) ? -INFINITY : round == 0 ? score : fabsf(score - found.center);
            });
            if (round == 0) found.center = median;
            else found.deviation = median;
        }
    } else {
        found.center = mean_of(fixed_scale_of(largest_of(scan.scores)), [](float score) { return score; });
        const auto square = [&](float score) { return (score - found.center) * (score - found.center); };
        const double scale = fixed_scale_of(maximum(square(found.low), square(found.high)));
        found.deviation = sqrtf(mean_of(scale, square));
        const float highest = response_power(found.high - found.center, found.deviation, config);
        found.mean = mean_of(kUnitScale, [&](float score) {
            return exponential(response_power(score - found.center, found.deviation, config) - highest);
        });
    }
    return found;
}

// The factor of a response from its score.
__device__ inline float response_factor(float score, const Comparison& found, float progress,
                                        const ShapingConfig& config) {
    if (!is_finite(score)) return 1.0f;
    float factor;
    if (config.response == ResponseWeight::kMinMax) {
        factor = min_max_factor(min_max_unit(score, found.low, found.high), found.mean, found.low, found.high, config);
    } else if (config.response == ResponseWeight::kMedianMad) {
        factor = median_factor(score - found.center, found.deviation, config);
    } else {
        const float highest = response_power(found.high - found.center, found.deviation, config);
        factor = exponential(response_power(score - found.center, found.deviation, config) - highest) / found.mean;
    }
    return faded_in(factor, progress, config);
}

// Calls body(response, factor) for this block's share of the responses. Whole blocks call it.
template <typename Body>
__device__ void for_each_response(const float* scores, const int64_t* group_ids, int64_t batch, float progress,
                                  const ShapingConfig& config, Body body) {
    const bool compares = config.response != ResponseWeight::kNone;
    const bool once = config.response_scope == ResponseScope::kBatch;
    Comparison found = {};
    for (int64_t response = blockIdx.x; response < batch; response += gridDim.x) {
        if (compares && (response == blockIdx.x || !once)) {
            found = compare(peers_of(scores, group_ids, batch, response, config), config);
        }
        body(response, compares ? response_factor(scores[response], found, progress, config) : 1.0f);
    }
}

// ---- kernel ---------------------------------------------------------------------------------------------------

constexpr int kFactorThreads = 128;  // of a block, which takes a response

struct ResponseFactorsArguments {
    const float* scores;       // [B]
    const int64_t* group_ids;  // [B]
    int64_t batch;
    float progress;
    ShapingConfig config;
    float* factors;  // [B]
};

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    response_factors_kernel(const __grid_constant__ ResponseFactorsArguments arguments) {
    float* const factors = arguments.factors;
    for_each_response(arguments.scores, arguments.group_ids, arguments.batch, arguments.progress, arguments.config,
                      [=](int64_t response, float factor) {
                          if (threadIdx.x == 0) factors[response] = factor;
                      });
}

}  // namespace cuda
}  // namespace vgpo
