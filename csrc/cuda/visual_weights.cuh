// From cosines to factors: compensation, the gate, and re-weighting within a response and within a group (Eq. 5-11).
//
// Cosines say what is weighted: those of a response that are NaN up to the first number belong to tokens that see no
// image yet, and are left out.
//
// A block takes a response. Sums that factors depend on are 64-bit fixed-point numbers, minima, maxima and the gate's
// threshold are exact, so a response's weights are the same bits whatever surrounds it. The threshold is found by radix
// selection, four passes over the tail for any length.
//
// Memory traffic: a few floats a token. Seven passes over a response, bound by latency. Up to 8,192 tokens all but the
// first read shared memory: some 3 us for 2,048 tokens. A longer response is read from the cache, some tens of
// microseconds for 32,768 tokens (expected, not measured). As many responses as there are resident blocks go on at the
// same time.
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
    // [tokens] by ordinal, those of a response from its token_begin on: cosines until the response is weighed, then w.
    float* weights = nullptr;
    ResponseFocus* responses = nullptr;  // [B]
    float* scores = nullptr;             // [B] s, NaN for a response that is not weighted
};

inline void bind_weights(WeightsWorkspace& workspace, Arena& arena, const Layout& layout) {
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

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// The k-th largest (k >= 1) of value(0), ..., value(count - 1), to every thread of the block. Each pass counts how many
// values have each next digit among those that share the digits found so far. Every warp looks for the digit by itself,
// so that a pass has one barrier. The caller puts one between two calls.
template <typename Value>
__device__ float kth_largest(int count, int k, Value value) {
    constexpr int kPasses = 32 / kDigitBits, kOwn = kDigits / kWarpSize;
    alignas(16) __shared__ int histograms[kPasses * kDigits];
    for (int i = threadIdx.x; i < kPasses * kDigits; i += blockDim.x) histograms[i] = 0;
    __syncthreads();
    unsigned prefix = 0;
    int wanted = k;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        int* histogram = histograms + pass * kDigits;
        const int shift = 32 - (pass + 1) * kDigitBits;
        for_each_loaded<4>(count, value, [&](int, float loaded) {
            const unsigned key = static_cast<unsigned>(order_key(loaded)) ^ 0x80000000u;
            const bool candidate = pass == 0 || (key >> (shift + kDigitBits)) == prefix;
            if (candidate) atomicAdd(&histogram[(key >> shift) & (kDigits - 1)], 1);
        });
        __syncthreads();
        // A lane looks at a few neighbouring digits, the first lane at the largest.
        const int first = kDigits - (lane_index() + 1) * kOwn;
        int counts[kOwn], own = 0;
#pragma unroll
        for (int i = 0; i < kOwn; i += 4) {
            const int4 four = *reinterpret_cast<const int4*>(histogram + first + i);
            counts[i] = four.x;
            counts[i + 1] = four.y;
            counts[i + 2] = four.z;
            counts[i + 3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) own += counts[i];
        int above = warp_inclusive_sum(own) - own;
        const unsigned finders = __ballot_sync(kAllLanes, above < wanted && wanted <= above + own);
        int digit = 0, rank = 0;
#pragma unroll
        for (int i = kOwn - 1; i >= 0; --i) {
            const bool found = above < wanted && wanted <= above + counts[i];
            digit = found ? first + i : digit;
            rank = found ? wanted - above : rank;
            above += counts[i];
        }
        const int finder = __ffs(static_cast<int>(finders)) - 1;
        prefix = prefix << kDigitBits | static_cast<unsigned>(__shfl_sync(kAllLanes, digit, finder));
        wanted = __shfl_sync(kAllLanes, rank, finder);
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

__device__ inline CosineScan warp_reduce(CosineScan scan) {
    return {warp_reduce(Extremes::of(scan.smallest)).low, warp_min(scan.first), warp_sum(scan.nans),
            warp_sum(scan.broken)};
}

// What decides how a block goes on with a response.
struct Inspected {
    Standing standing;
    int start;
};

// A block lists the cosines of a response by ordinal, looks whether they can be weighted, and for the smallest one. `cos`
// is [tokens], or by ordinal already, perhaps the very list.
template <bool kByOrdinal>
__device__ Inspected inspect_response(const ResponseTokens& tokens, const float* cos, bool has_image, float* cosines,
                                      ResponseFocus& result) {
    CosineScan scan = CosineScan::identity();
    for_each_loaded<8>(
        has_image ? tokens.length : 0, [&](int ordinal) { return cos[kByOrdinal ? tokens.begin + ordinal : tokens.token(ordinal)]; },
        [&](int ordinal, float value) {
            cosines[ordinal] = value;
            const bool nan = value != value, signal = is_signal(value);
            scan.merge({signal ? value : INFINITY, nan ? INT32_MAX : ordinal, nan, !nan && !signal});
        });
    scan = block_reduce(scan);
    // Where all NaNs lead, there are as many as tokens before the first number.
    const bool broken = scan.broken > 0 || scan.nans > scan.first;
    const Standing standing = scan.first == INT32_MAX ? Standing::kUnweighted
                              : broken                ? Standing::kNonfinite
                                                      : Standing::kWeighted;
    if (threadIdx.x == 0) {
        result.standing = standing;
        result.smallest = standing == Standing::kWeighted ? scan.smallest : INFINITY;
        result.length = tokens.length;
        result.start = scan.first;
        result.gated = 0;
        result.cos_sum = 0.0;
        result.late_early = NAN;
    }
    return {standing, scan.first};
}

// The offset of the released score: the smallest cosine of the batch's weighted responses, at most zero.
__device__ inline float batch_offset(const ResponseFocus* responses, int64_t batch) {
    Extremes extremes = Extremes::of(0.0f);
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) extremes.merge(Extremes::of(responses[i].smallest));
    return block_reduce(extremes).low;
}

// Sums over the tokens of a response that see an image.
struct ResponseSums {
    int64_t weight;      // WeightsConfig::weight_scale
    int64_t normalized;  // kUnitScale
    // Of metrics alone:
    double cos;
    double early, late;  // rho of the first and second half
    int gated;

    __device__ static ResponseSums identity() { return {0, 0, 0.0, 0.0, 0.0, 0}; }
};

__device__ inline ResponseSums warp_reduce(const ResponseSums& sums) {
    return {warp_sum(sums.weight), warp_sum(sums.normalized), warp_sum(sums.cos),
            warp_sum(sums.early),  warp_sum(sums.late),       warp_sum(sums.gated)};
}

// Mean focus of the second half of a response over that of its first, from `start` on; NaN where it does not count.
__device__ inline float late_early_ratio(double early_sum, double late_sum, int start, int half, int length) {
    if (length == half || early_sum <= 0.0) return NAN;
    return static_cast<float>(late_sum / (length - half) / (early_sum / (half - start)));
}

// Tokens of a response that a block keeps in shared memory while it weighs them.
constexpr int kKeptTokens = 8192;

// A block computes w of a response's tokens that see an image, their extremes and normalised mean, and the score (Eq.
// 5-9). `values` are the cosines by ordinal, and then w; `weights` gets w, too, and may be the same. Tokens before the
// start are left out.
__device__ inline void weigh_response(int count, Inspected inspected, float* values, float offset,
                                      const WeightsConfig& config, float* weights, ResponseFocus& result,
                                      float& score) {
    if (inspected.standing != Standing::kWeighted) {
        if (threadIdx.x == 0) score = NAN;
        return;
    }
    const int start = inspected.start, counted = count - start;
    const int share = static_cast<int>(tail_first(count, config));
    const int first = share > start ? share : start, tail = count - first;
    const int top = static_cast<int>(tail_top_count(tail, config));
    float threshold = INFINITY;
    if (config.gate && top > 0) threshold = kth_largest(tail, top, [=](int i) { return values[first + i]; });
    Extremes extremes = Extremes::identity();
    ResponseSums sums = ResponseSums::identity();
    const Ramp ramp = ramp_of(count, config);
    const int half = (count + 1) / 2;
    for_each_loaded<4>(
        counted, [=](int i) { return values[start + i]; },
        [&](int i, float cos) {
            const int ordinal = start + i;
            const bool open = !config.gate || (ordinal >= first && cos >= threshold);
            const float compensated = open ? compensation(static_cast<float>(ordinal), ramp, config) : 0.0f;
            const float focus = focus_score(cos, offset, config), weight = compensated_weight(focus, compensated);
            values[ordinal] = weight;
            if (weights != values) weights[ordinal] = weight;
            extremes.merge(Extremes::of(weight));
            sums.weight += to_fixed(weight, config.weight_scale);
            sums.cos += cos;
            sums.early += ordinal < half ? focus : 0.0;
            sums.late += ordinal < half ? 0.0 : focus;
            sums.gated += open;
        });
    extremes = block_reduce(extremes);
    for_each_loaded<4>(
        counted, [=](int i) { return values[start + i]; },
        [&](int, float weight) {
            const float normalized = min_max_normalized(weight, extremes.low, extremes.high);
            sums.normalized += to_fixed(normalized, kUnitScale);
        });
    sums = reduce_to_first_warp(sums);
    if (threadIdx.x == 0) {
        result.gated = sums.gated;
        result.low = extremes.low;
        result.high = extremes.high;
        result.mean = mean_from_fixed(sums.normalized, kUnitScale, counted);
        result.cos_sum = sums.cos;
        result.late_early = late_early_ratio(sums.early, sums.late, start, half, count);
        score = accumulated_score(sums.weight, sums.normalized, counted, config);
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
template <bool kByOrdinal, typename HasImage>
__device__ void weigh_responses(const Layout& layout, const FocusWorkspace& lists, const WeightsWorkspace& workspace,
                                const float* cos, const WeightsConfig& config, HasImage has_image) {
    __shared__ float kept[kKeptTokens];
    const bool waits = config.needs_batch_offset();
    // From one side of the grid barrier to the other a block can keep one response.
    const bool keeps = !waits || layout.batch <= static_cast<int64_t>(gridDim.x);
    float offset = config.score_offset;
#pragma unroll 1
    for (int round = 0; round <= static_cast<int>(waits); ++round) {
        if (round == 1) {
            grid_sync();
            offset = batch_offset(workspace.responses, layout.batch);
        }
        for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
            const ResponseTokens tokens = response_tokens(layout, lists, response);
            ResponseFocus& result = workspace.responses[response];
            float* weights = workspace.weights + tokens.begin;
            float* values = keeps && tokens.length <= kKeptTokens ? kept : weights;
            const Inspected inspected =
                round == 0 ? inspect_response<kByOrdinal>(tokens, cos, has_image(response), values, result)
                           : Inspected{result.standing, result.start};
            if (round == 0 && waits) continue;
            weigh_response(tokens.length, inspected, values, offset, config, weights, result,
                           workspace.scores[response]);
        }
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
    FocusWorkspace lists;        // of tokens alone
    WeightsWorkspace workspace;  // `scores` is a result
    unsigned* finished;          // [] blocks
    float* factors;             // [tokens], as psi and w
    float* psi;
    float* w;
    float* phi;      // [B]
    float* metrics;  // [kFocusMetrics]
};

inline void bind(VisualWeightsArguments& arguments, Arena& arena) {
    bind_tokens(arguments.lists, arena, arguments.layout);
    bind_weights(arguments.workspace, arena, arguments.layout);
    arguments.finished = arena.take<unsigned>("finished", 1);
}

inline int64_t useful_blocks(const VisualWeightsArguments& arguments) { return arguments.layout.batch; }

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    visual_weights_kernel(const __grid_constant__ VisualWeightsArguments arguments) {
    const Layout& layout = arguments.layout;
    const WeightsConfig& config = arguments.config;
    float *factors = arguments.factors, *psi = arguments.psi, *w = arguments.w;
    if (blockIdx.x == 0 && threadIdx.x == 0) *arguments.finished = 0;
    prefetch_tokens(arguments.cos, layout.num_tokens());
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        index_tokens(layout, arguments.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                     response, [=](int64_t token) {
                         factors[token] = 1.0f;
                         psi[token] = w[token] = 0.0f;
                     });
    }
    __syncthreads();  // a block weighs the responses it has listed
    const bool* has_visual = arguments.has_visual;
    weigh_responses<false>(layout, arguments.lists, arguments.workspace, arguments.cos, config,
                    [=](int64_t response) { return has_visual == nullptr || has_visual[response]; });
    grid_sync();
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        const ResponseTokens tokens = response_tokens(layout, arguments.lists, response);
        const ResponseFocus focus = arguments.workspace.responses[response];
        const float phi = group_weight(arguments.workspace, arguments.group_ids, layout.batch, response, config);
        if (threadIdx.x == 0) arguments.phi[response] = phi;
        const bool weighted = focus.standing == Standing::kWeighted;
        const float* weights = arguments.workspace.weights + tokens.begin;
        struct Loaded {
            int64_t token;
            float weight;
        };
        for_each_loaded<4>(
            tokens.length, [=](int ordinal) { return Loaded{tokens.token(ordinal), weights[ordinal]}; },
            [&](int ordinal, Loaded loaded) {
                const float intra = weighted ? intra_weight(loaded.weight, ordinal, focus, config) : 0.0f;
                w[loaded.token] = weighted && ordinal >= focus.start ? loaded.weight : 0.0f;
                psi[loaded.token] = intra;
                factors[loaded.token] = weighted ? advantage_factor(intra, phi, config) : 1.0f;
            });
    }
    if (!is_last_block(arguments.finished) || warp_index() > 0) return;
    write_focus_metrics(arguments.workspace.responses, layout.batch, arguments.metrics);
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
