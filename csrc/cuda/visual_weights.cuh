// From cosines to factors: compensation, the gate, and re-weighting within a response and within a group (Eq. 5-11).
//
// Cosines say what is weighted: those of a response that are NaN up to the first number belong to tokens that see no
// image yet, and are left out.
//
// A block takes a response. Sums that factors depend on are 64-bit fixed-point numbers, minima, maxima and the gate's
// threshold are exact, so a response's weights are the same bits whatever surrounds it. The threshold is found by radix
// selection, three passes over the tail for any length.
//
// Memory traffic: a few floats a token, all but the first read from the cache. Six passes over a response, bound by
// latency: with four to eight loads in flight per thread, some microseconds for 2,048 tokens and some tens for 32,768
// (expected, not measured), of which as many responses as there are resident blocks go on at the same time.
#pragma once

#include "visual_focus.cuh"

namespace vgpo {
namespace cuda {

enum class Standing : int32_t {
    kWeighted,
    kUnweighted,  // no image, or no token that sees it
    kNonfinite,   // a cosine that is no signal, other than a NaN before the first number
};

// What a response brings to its tokens' factors and to the metrics.
struct ResponseFocus {
    Standing standing;
    int32_t length;     // T
    int32_t start;      // leading tokens that see no image: their cosines are NaN, and they count nowhere
    int32_t gated;      // tokens with an open gate
    float smallest;     // cosine; infinity where it is not weighted
    float low, high;    // extremes of w
    float mean;         // of normalised w
    float late_early;   // mean rho of the second half over that of the first; NaN where it does not count
    int32_t leads;      // of a weighted response: the members of its group if it is the first of them, else 0
    double cos_sum;
};

// The lists of tokens come from FocusWorkspace.
struct WeightsWorkspace {
    float* cosines = nullptr;            // [tokens] by ordinal: those of a response from its token_begin on
    float* weights = nullptr;            // [tokens] w, likewise
    ResponseFocus* responses = nullptr;  // [B]
    float* scores = nullptr;             // [B] s, NaN for a response that is not weighted
};

inline void bind_weights(WeightsWorkspace& workspace, Arena& arena, const Layout& layout) {
    workspace.cosines = arena.take<float>("cosines", layout.num_tokens());
    workspace.weights = arena.take<float>("weights", layout.num_tokens());
    workspace.responses = arena.take<ResponseFocus>("responses", layout.batch);
}

// Random access to the tokens of a response by ordinal.
struct ResponseTokens {
    int64_t begin;         // first token of the response
    int length;            // T
    const int32_t* index;  // [T]

    __device__ int64_t token(int ordinal) const { return begin + index[ordinal]; }
};

__device__ inline ResponseTokens response_tokens(const Layout& layout, const FocusWorkspace& lists, int64_t response) {
    const int64_t begin = layout.token_begin(response);
    return {begin, lists.token_count[response], lists.token_index + begin};
}

// ---- the k-th largest cosine ----------------------------------------------------------------------------------

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// The k-th largest (k >= 1) of value(0), ..., value(count - 1), to every thread of the block. Each pass counts how many
// values have each next digit among those that share the digits found so far.
template <typename Value>
__device__ float kth_largest(int count, int k, Value value) {
    __shared__ int histogram[kDigits];
    __shared__ unsigned found_digit;
    __shared__ int above_digit;
    const int per_thread = ceil_div(kDigits, static_cast<int>(blockDim.x));
    unsigned prefix = 0;
    int wanted = k;
    for (int bits_left = 32; bits_left > 0;) {
        const int digit_bits = bits_left < kDigitBits ? bits_left : kDigitBits;
        const int shift = bits_left - digit_bits;
        for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) histogram[digit] = 0;
        __syncthreads();
        for_each_loaded<8>(count, value, [&](int, float loaded) {
            const unsigned key = static_cast<unsigned>(order_key(loaded)) ^ 0x80000000u;
            const bool candidate = bits_left == 32 || (key >> bits_left) == prefix;
            if (candidate) atomicAdd(&histogram[(key >> shift) & ((1u << digit_bits) - 1)], 1);
        });
        __syncthreads();
        // A thread looks at a few neighbouring digits, the first thread at the largest.
        const int top = kDigits - 1 - static_cast<int>(threadIdx.x) * per_thread;
        int own = 0;
        for (int digit = top; digit > top - per_thread && digit >= 0; --digit) own += histogram[digit];
        int above = block_inclusive_sum(own) - own;
        for (int digit = top; digit > top - per_thread && digit >= 0; --digit) {
            if (above < wanted && wanted <= above + histogram[digit]) {
                found_digit = static_cast<unsigned>(digit);
                above_digit = above;
            }
            above += histogram[digit];
        }
        __syncthreads();
        prefix = prefix << digit_bits | found_digit;
        wanted -= above_digit;
        bits_left = shift;  // the next pass writes what this one has read only after its own barriers
    }
    return order_key_value(static_cast<int32_t>(prefix ^ 0x80000000u));
}

// ---- a response -----------------------------------------------------------------------------------------------

struct CosineScan {
    float smallest;     // signal
    int32_t first;      // ordinal of the first that is not NaN
    int32_t nans;
    int32_t broken;     // numbers that are no signals

    __device__ static CosineScan identity() { return {INFINITY, INT32_MAX, 0, 0}; }
    __device__ void merge(const CosineScan& other) {
        smallest = other.smallest < smallest ? other.smallest : smallest;
        first = other.first < first ? other.first : first;
        nans += other.nans;
        broken += other.broken;
    }
};

// A block lists the cosines of a response by ordinal, looks whether they can be weighted, and for the smallest one.
__device__ inline void inspect_response(const ResponseTokens& tokens, const float* cos, bool has_image,
                                        float* cosines, ResponseFocus& result) {
    CosineScan scan = CosineScan::identity();
    for_each_loaded<8>(
        has_image ? tokens.length : 0, [&](int ordinal) { return cos[tokens.token(ordinal)]; },
        [&](int ordinal, float value) {
            cosines[ordinal] = value;
            const bool nan = value != value, signal = is_signal(value);
            scan.merge({signal ? value : INFINITY, nan ? INT32_MAX : ordinal, nan, !nan && !signal});
        });
    scan = block_reduce(scan);
    if (threadIdx.x == 0) {
        // Where all NaNs lead, there are as many as tokens before the first number.
        const bool broken = scan.broken > 0 || scan.nans > scan.first;
        result.standing = scan.first == INT32_MAX ? Standing::kUnweighted
                          : broken                ? Standing::kNonfinite
                                                  : Standing::kWeighted;
        result.smallest = result.standing == Standing::kWeighted ? scan.smallest : INFINITY;
        result.length = tokens.length;
        result.start = scan.first;
        result.gated = 0;
        result.cos_sum = 0.0;
        result.late_early = NAN;
    }
    __syncthreads();
}

// The offset of the released score: the smallest cosine of the batch's weighted responses, at most zero.
__device__ inline float batch_offset(const ResponseFocus* responses, int64_t batch) {
    Extremes extremes = Extremes::of(0.0f);
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) extremes.merge(Extremes::of(responses[i].smallest));
    return block_reduce(extremes).low;
}

// Of the first pass over a response: w.
struct WeightSums {
    Extremes weight;
    int64_t total;  // WeightsConfig::weight_scale
    int64_t gated;

    __device__ static WeightSums identity() { return {Extremes::identity(), 0, 0}; }
    __device__ void merge(const WeightSums& other) {
        weight.merge(other.weight);
        total += other.total;
        gated += other.gated;
    }
};

// Of the second pass, which knows the extremes of w.
struct NormalizedSums {
    int64_t normalized;  // kUnitScale
    // Of metrics alone:
    double cos;
    double early, late;  // rho of the first and second half

    __device__ static NormalizedSums identity() { return {0, 0.0, 0.0, 0.0}; }
    __device__ void merge(const NormalizedSums& other) {
        normalized += other.normalized;
        cos += other.cos;
        early += other.early;
        late += other.late;
    }
};

// Mean focus of the second half of a response over that of its first, from `start` on; NaN where it does not count.
__device__ inline float late_early_ratio(double early_sum, double late_sum, int start, int half, int length) {
    if (length == half || early_sum <= 0.0) return NAN;
    return static_cast<float>(late_sum / (length - half) / (early_sum / (half - start)));
}

// A block computes w of a response's tokens that see an image, their extremes and normalised mean, and the score (Eq.
// 5-9). `cosines` and `weights` are by ordinal; those before `result.start` are left out.
__device__ inline void weigh_response(int count, const float* cosines, float offset, const WeightsConfig& config,
                                      float* weights, ResponseFocus& result, float& score) {
    if (result.standing != Standing::kWeighted) {
        if (threadIdx.x == 0) score = NAN;
        return;
    }
    const int start = result.start, counted = count - start;
    const int share = static_cast<int>(tail_first(count, config));
    const int first = share > start ? share : start, tail = count - first;
    const int top = static_cast<int>(tail_top_count(tail, config));
    float threshold = INFINITY;
    if (config.gate && top > 0) threshold = kth_largest(tail, top, [=](int i) { return cosines[first + i]; });
    WeightSums sums = WeightSums::identity();
    const Ramp ramp = ramp_of(count, config);
    for_each_loaded<4>(
        counted, [=](int i) { return cosines[start + i]; },
        [&](int i, float value) {
            const int ordinal = start + i;
            const bool open = !config.gate || (ordinal >= first && value >= threshold);
            const float compensated = open ? compensation(static_cast<float>(ordinal), ramp, config) : 0.0f;
            const float weight = compensated_weight(focus_score(value, offset, config), compensated);
            weights[ordinal] = weight;
            sums.merge({Extremes::of(weight), to_fixed(weight, config.weight_scale), open});
        });
    sums = block_reduce(sums);
    NormalizedSums second = NormalizedSums::identity();
    const int half = (count + 1) / 2;
    for_each_loaded<4>(
        counted, [=](int i) { return make_float2(weights[start + i], cosines[start + i]); },
        [&](int i, float2 loaded) {
            const float normalized = min_max_normalized(loaded.x, sums.weight.low, sums.weight.high);
            const float focus = focus_score(loaded.y, offset, config);
            second.merge({to_fixed(normalized, kUnitScale), loaded.y, start + i < half ? focus : 0.0,
                          start + i < half ? 0.0 : focus});
        });
    second = block_reduce(second);
    if (threadIdx.x == 0) {
        result.gated = static_cast<int32_t>(sums.gated);
        result.low = sums.weight.low;
        result.high = sums.weight.high;
        result.mean = mean_from_fixed(second.normalized, kUnitScale, counted);
        result.cos_sum = second.cos;
        result.late_early = late_early_ratio(second.early, second.late, start, half, count);
        score = accumulated_score(sums.total, second.normalized, counted, config);
    }
}

// psi of a token of a weighted response (Eq. 8) from its w, which nobody has written before the response's start.
__device__ inline float intra_weight(float weight, int ordinal, const ResponseFocus& response,
                                     const WeightsConfig& config) {
    if (!config.intra || ordinal < response.start) return 0.0f;
    return min_max_normalized(weight, response.low, response.high) - response.mean;
}

// Weights every response of the batch, a block each, once the tokens are listed and `cos` is complete. The caller puts
// a grid barrier before it reads another response's results. `has_image(response)` says which responses have an image.
template <typename HasImage>
__device__ void weigh_responses(const Layout& layout, const FocusWorkspace& lists, const WeightsWorkspace& workspace,
                                const float* cos, const WeightsConfig& config, HasImage has_image) {
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        const ResponseTokens tokens = response_tokens(layout, lists, response);
        inspect_response(tokens, cos, has_image(response), workspace.cosines + tokens.begin,
                         workspace.responses[response]);
    }
    float offset = config.score_offset;
    if (config.needs_batch_offset()) {
        grid_sync();
        offset = batch_offset(workspace.responses, layout.batch);
    }
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        const int64_t begin = layout.token_begin(response);
        weigh_response(lists.token_count[response], workspace.cosines + begin, offset, config,
                       workspace.weights + begin, workspace.responses[response], workspace.scores[response]);
    }
}

// ---- a group --------------------------------------------------------------------------------------------------

struct GroupMembers {
    Extremes scores;
    int32_t members;
    int32_t first;  // response

    __device__ static GroupMembers identity() { return {Extremes::identity(), 0, INT32_MAX}; }
    __device__ void merge(const GroupMembers& other) {
        scores.merge(other.scores);
        members += other.members;
        first = other.first < first ? other.first : first;
    }
};

__device__ inline GroupMembers warp_reduce(GroupMembers group) {
    return {warp_reduce(group.scores), warp_sum(group.members), warp_min(group.first)};
}

// A warp computes phi of a response from the scores of its group's members (Eq. 9-10), which are the finite ones of
// responses that `may_join`; 0 for one who is no member. `group` is the response's.
template <typename MayJoin>
__device__ float group_weight(const float* scores, const int64_t* group_ids, int64_t batch, int64_t response,
                              const WeightsConfig& config, MayJoin may_join, GroupMembers& group) {
    group = GroupMembers::identity();
    const int64_t id = group_ids[response];
    const float own = scores[response];
    if (!may_join(response) || !is_finite(own)) return 0.0f;
    // No condition stands between the loads.
    const auto joins = [&](int64_t i) { return (group_ids[i] == id) & may_join(i) & is_finite(scores[i]); };
#pragma unroll 2
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) {
        const float score = scores[i];
        if (joins(i)) group.merge({Extremes::of(score), 1, static_cast<int32_t>(i)});
    }
    group = warp_reduce(group);
    if (!config.inter) return 0.0f;
    int64_t sum = 0;
#pragma unroll 2
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) {
        const float score = scores[i];
        if (joins(i)) sum += to_fixed(min_max_normalized(score, group.scores.low, group.scores.high), kUnitScale);
    }
    sum = warp_sum(sum);
    return min_max_normalized(own, group.scores.low, group.scores.high) -
           mean_from_fixed(sum, kUnitScale, group.members);
}

// The same from the weighing of all responses, with a note for the metrics, which need a grid barrier. Only a response
// that is weighted has a score.
__device__ inline float group_weight(const WeightsWorkspace& workspace, const int64_t* group_ids, int64_t batch,
                                     int64_t response, const WeightsConfig& config) {
    GroupMembers group;
    const float phi = group_weight(workspace.scores, group_ids, batch, response, config, [](int64_t) { return true; },
                                   group);
    // Warps that share a response write the same.
    if (lane_index() == 0) workspace.responses[response].leads = group.first == response ? group.members : 0;
    return phi;
}

// ---- metrics --------------------------------------------------------------------------------------------------

struct FocusTotals {
    double cos_sum, late_early;
    int64_t tokens, gated;
    int32_t weighted, nonfinite, compared, groups, singletons, padding;

    __device__ static FocusTotals identity() { return {0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0}; }
    __device__ void merge(const FocusTotals& other) {
        cos_sum += other.cos_sum;
        late_early += other.late_early;
        tokens += other.tokens;
        gated += other.gated;
        weighted += other.weighted;
        nonfinite += other.nonfinite;
        compared += other.compared;
        groups += other.groups;
        singletons += other.singletons;
    }
};

// A warp adds up the responses' contributions. metrics: [kFocusMetrics].
__device__ inline void write_focus_metrics(const ResponseFocus* responses, int64_t batch, float* metrics) {
    FocusTotals totals = FocusTotals::identity();
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) {
        const ResponseFocus response = responses[i];
        totals.nonfinite += response.standing == Standing::kNonfinite;
        if (response.standing != Standing::kWeighted) continue;
        const bool compared = response.late_early == response.late_early;
        totals.merge({response.cos_sum, compared ? response.late_early : 0.0, response.length - response.start,
                      response.gated, 1, 0, compared, response.leads > 0, response.leads == 1, 0});
    }
    totals = warp_reduce(totals);
    if (lane_index() != 0) return;
    const double tokens = static_cast<double>(totals.tokens);  // the mean of nothing is NaN
    metrics[kFocusMean] = static_cast<float>(totals.cos_sum / tokens);
    metrics[kGateRate] = static_cast<float>(static_cast<double>(totals.gated) / tokens);
    metrics[kLateEarlyRatio] = static_cast<float>(totals.late_early / totals.compared);
    metrics[kWeightedResponses] = static_cast<float>(totals.weighted);
    metrics[kNonfiniteResponses] = static_cast<float>(totals.nonfinite);
    metrics[kGroups] = static_cast<float>(totals.groups);
    metrics[kSingletonGroups] = static_cast<float>(totals.singletons);
}

// ---- kernels --------------------------------------------------------------------------------------------------

struct VisualWeightsArguments {
    Layout layout;
    const float* cos;           // [tokens]
    const bool* response_mask;  // [tokens]
    const int64_t* group_ids;   // [B]
    const bool* has_visual;     // [B], or null: all have
    WeightsConfig config;
    FocusWorkspace lists;       // of tokens alone
    WeightsWorkspace workspace;  // `scores` is a result
    float* factors;             // [tokens], as psi and w
    float* psi;
    float* w;
    float* phi;      // [B]
    float* metrics;  // [kFocusMetrics]
};

inline void bind(VisualWeightsArguments& arguments, Arena& arena) {
    bind_tokens(arguments.lists, arena, arguments.layout);
    bind_weights(arguments.workspace, arena, arguments.layout);
}

inline int64_t useful_blocks(const VisualWeightsArguments& arguments) { return arguments.layout.batch; }

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    visual_weights_kernel(const __grid_constant__ VisualWeightsArguments arguments) {
    const Layout& layout = arguments.layout;
    const WeightsConfig& config = arguments.config;
    float *factors = arguments.factors, *psi = arguments.psi, *w = arguments.w;
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        index_tokens(layout, arguments.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                     response, [=](int64_t token) {
                         factors[token] = 1.0f;
                         psi[token] = w[token] = 0.0f;
                     });
    }
    __syncthreads();  // a block weighs the responses it has listed
    const bool* has_visual = arguments.has_visual;
    weigh_responses(layout, arguments.lists, arguments.workspace, arguments.cos, config,
                    [=](int64_t response) { return has_visual == nullptr || has_visual[response]; });
    grid_sync();
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        const ResponseTokens tokens = response_tokens(layout, arguments.lists, response);
        const ResponseFocus& focus = arguments.workspace.responses[response];
        const float phi = group_weight(arguments.workspace, arguments.group_ids, layout.batch, response, config);
        if (threadIdx.x == 0) arguments.phi[response] = phi;
        const bool weighted = focus.standing == Standing::kWeighted;
        const float* weights = arguments.workspace.weights + tokens.begin;
        for (int ordinal = threadIdx.x; ordinal < tokens.length; ordinal += blockDim.x) {
            const int64_t token = tokens.token(ordinal);
            const float weight = weights[ordinal];
            const float intra = weighted ? intra_weight(weight, ordinal, focus, config) : 0.0f;
            w[token] = weighted && ordinal >= focus.start ? weight : 0.0f;
            psi[token] = intra;
            factors[token] = weighted ? advantage_factor(intra, phi, config) : 1.0f;
        }
    }
    grid_sync();
    if (blockIdx.x == 0) write_focus_metrics(arguments.workspace.responses, layout.batch, arguments.metrics);
}

constexpr int kGroupThreads = 32;  // of a block, which takes a response

struct GroupWeightsArguments {
    const float* scores;       // [B]
    const int64_t* group_ids;  // [B]
    const bool* has_visual;    // [B], or null: all have
    int64_t batch;
    WeightsConfig config;
    float* phi;  // [B]
};

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    group_weights_kernel(const __grid_constant__ GroupWeightsArguments arguments) {
    const bool* has_visual = arguments.has_visual;
    const auto may_join = [=](int64_t i) { return has_visual == nullptr || has_visual[i]; };
    for (int64_t response = blockIdx.x; response < arguments.batch; response += gridDim.x) {
        GroupMembers group;
        const float phi = group_weight(arguments.scores, arguments.group_ids, arguments.batch, response,
                                       arguments.config, may_join, group);
        if (threadIdx.x == 0) arguments.phi[response] = phi;
    }
}

}  // namespace cuda
}  // namespace vgpo
