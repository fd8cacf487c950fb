// From cosines to factors: compensation, the gate, and re-weighting within a response and within a group (Eq. 5-11).
//
// A block takes a response of up to 8,192 tokens and keeps it in shared memory: seven passes, bound by latency, some 3 us
// for 2,048 tokens. Of a longer response blocks take slices, with grid barriers between the passes: some 15 us for 32,768
// tokens (both expected, not measured). Which way a response goes depends on its own length alone.
#pragma once

#include "weigh_response.cuh"

namespace vgpo {
namespace cuda {

// ---- slices ---------------------------------------------------------------------------------------------------

constexpr int kSliceTokens = 1024;

constexpr __host__ __device__ int slice_count(int length) {
    return length <= kKeptTokens ? 0 : ceil_div(length, kSliceTokens);
}

// The most slices a batch can have.
inline int64_t max_slices(const Layout& layout) {
    if (layout.tokens <= kKeptTokens) return 0;
    if (layout.cu_seqlens == nullptr) return layout.batch * ceil_div<int64_t>(layout.tokens, kSliceTokens);
    const int64_t sliced = layout.tokens / kKeptTokens;
    return layout.tokens / kSliceTokens + (layout.batch < sliced ? layout.batch : sliced);
}

// The lists of tokens come from FocusWorkspace.
struct WeightsWorkspace {
    // [tokens] by ordinal, those of a response from its token_begin on: cosines until the response is weighed, then w.
    float* weights = nullptr;
    ResponseFocus* responses = nullptr;  // [B]
    float* scores = nullptr;             // [B] s, NaN for a response that is not weighted
    // Where a response may be sliced:
    CosineScan* scans = nullptr;         // [slices]
    Extremes* extremes = nullptr;        // [slices] of w
    ResponseSums* sums = nullptr;        // [slices]
    int* histograms = nullptr;           // [B, kPasses, kDigits] of the search for the gate's threshold
    unsigned* arrived = nullptr;         // [B] slices that are done
};

inline void bind_weights(WeightsWorkspace& workspace, Arena& arena, const Layout& layout) {
    workspace.weights = arena.take<float>("weights", layout.num_tokens());
    workspace.responses = arena.take<ResponseFocus>("responses", layout.batch);
    const int64_t slices = max_slices(layout);
    if (slices == 0) return;
    workspace.scans = arena.take<CosineScan>("scans", slices);
    workspace.extremes = arena.take<Extremes>("extremes", slices);
    workspace.sums = arena.take<ResponseSums>("response_sums", slices);
    workspace.histograms = arena.take<int>("histograms", layout.batch * kPasses * kDigits);
    workspace.arrived = arena.take<unsigned>("arrived", layout.batch);
}

// A slice of a response: ordinals [first, last).
struct Slice {
    int index;       // among all slices
    int response;
    int first, last;
    int begin, end;  // the slices of its response
    ResponseTokens tokens;

    __device__ bool leads() const { return index == begin; }
};

// Calls body(slice) for this block's share of the slices.
template <typename Body>
__device__ void for_each_slice(const Layout& layout, const FocusWorkspace& lists, Body body) {
    const int32_t* counts = lists.token_count;
    auto cursor = ragged_cursor(layout.batch, [=](int response) { return slice_count(counts[response]); });
    for (int item = blockIdx.x; cursor.seek(item); item += gridDim.x) {
        const ResponseTokens tokens = response_tokens(layout, lists, cursor.response());
        const int first = (item - cursor.begin()) * kSliceTokens;
        const int last = first + kSliceTokens < tokens.length ? first + kSliceTokens : tokens.length;
        const int end = cursor.begin() + slice_count(tokens.length);
        body(Slice{item, cursor.response(), first, last, cursor.begin(), end, tokens});
    }
}

__device__ inline bool any_slice(const Layout& layout, const FocusWorkspace& lists) {
    bool any = false;
    for (int64_t i = lane_index(); i < layout.batch; i += kWarpSize) any |= slice_count(lists.token_count[i]) > 0;
    return __any_sync(kAllLanes, any) != 0;
}

// What the slices of a response have found, put together in their order by every warp for itself.
template <typename T>
__device__ T of_slices(const T* found, const Slice& slice) {
    T whole = T::identity();
    for (int i = slice.begin + lane_index(); i < slice.end; i += kWarpSize) whole.merge(found[i]);
    return warp_reduce(whole);
}

// The first pass over slices: the cosines.
template <bool kByOrdinal, typename HasImage>
__device__ void scan_slices(const Layout& layout, const FocusWorkspace& lists, const WeightsWorkspace& workspace,
                            const float* cos, HasImage has_image) {
    for_each_slice(layout, lists, [&](const Slice& slice) {
        const CosineScan scan =
            scan_cosines<kByOrdinal>(slice.tokens, slice.first, has_image(slice.response) ? slice.last : slice.first,
                                     cos, workspace.weights + slice.tokens.begin);
        if (threadIdx.x == 0) workspace.scans[slice.index] = scan;
        if (!slice.leads()) return;
        int* histograms = workspace.histograms + static_cast<int64_t>(slice.response) * kPasses * kDigits;
        for (int i = threadIdx.x; i < kPasses * kDigits; i += blockDim.x) histograms[i] = 0;
        if (threadIdx.x == 0) workspace.arrived[slice.response] = 0;
    });
}

// The search in a response after so many passes.
__device__ inline Search search_of(const WeightsWorkspace& workspace, int response, const Tail& tail, int passes) {
    const int* histograms = workspace.histograms + static_cast<int64_t>(response) * kPasses * kDigits;
    Search search{0, tail.top};
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) find_digit(histograms + pass * kDigits, search);
    return search;
}

// The passes that find the thresholds, each with a grid barrier behind it; what is known of a response is noted.
__device__ inline void search_slices(const Layout& layout, const FocusWorkspace& lists,
                                     const WeightsWorkspace& workspace, const WeightsConfig& config) {
    __shared__ int counts[kDigits];
    const int passes = config.gate ? kPasses : 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
        for_each_slice(layout, lists, [&](const Slice& slice) {
            const CosineScan scan = of_slices(workspace.scans, slice);
            const int length = slice.tokens.length;
            if (pass == 0 && slice.leads() && threadIdx.x == 0) {
                begin_response(scan, length, workspace.responses[slice.response]);
            }
            const Inspected response = inspected(scan);
            if (!config.gate || response.standing != Standing::kWeighted) return;
            const Tail tail = tail_of(length, response.start, config);
            const int first = slice.first > tail.first ? slice.first : tail.first;
            if (tail.top == 0 || first >= slice.last) return;
            const Search search = search_of(workspace, slice.response, tail, pass);
            const float* cosines = workspace.weights + slice.tokens.begin + first;
            for (int i = threadIdx.x; i < kDigits; i += blockDim.x) counts[i] = 0;
            __syncthreads();
            count_digits(slice.last - first, [=](int i) { return cosines[i]; }, search, pass, counts);
            __syncthreads();
            int* histogram =
                workspace.histograms + (static_cast<int64_t>(slice.response) * kPasses + pass) * kDigits;
            for (int i = threadIdx.x; i < kDigits; i += blockDim.x) {
                if (counts[i] > 0) atomicAdd(&histogram[i], counts[i]);
            }
        });
        grid_sync();
    }
}

// The last two passes, with a grid barrier between them: w, and its normalised sum.
__device__ inline void weigh_slices(const Layout& layout, const FocusWorkspace& lists,
                                    const WeightsWorkspace& workspace, const WeightsConfig& config, float offset) {
    for_each_slice(layout, lists, [&](const Slice& slice) {
        const Inspected response = inspected(of_slices(workspace.scans, slice));
        if (response.standing != Standing::kWeighted) {
            if (slice.leads() && threadIdx.x == 0) workspace.scores[slice.response] = NAN;
            return;
        }
        const Tail tail = tail_of(slice.tokens.length, response.start, config);
        float threshold = INFINITY;
        if (config.gate && tail.top > 0) threshold = search_of(workspace, slice.response, tail, kPasses).found();
        float* weights = workspace.weights + slice.tokens.begin;
        Extremes extremes = Extremes::identity();
        ResponseSums sums = ResponseSums::identity();
        weigh_tokens(slice.first > response.start ? slice.first : response.start, slice.last, slice.tokens.length,
                     tail.first, threshold, offset, config, weights, weights, extremes, sums);
        extremes = block_reduce(extremes);
        sums = reduce_to_first_warp(sums);
        if (threadIdx.x == 0) {
            workspace.extremes[slice.index] = extremes;
            workspace.sums[slice.index] = sums;
        }
    });
    grid_sync();
    for_each_slice(layout, lists, [&](const Slice& slice) {
        ResponseFocus& result = workspace.responses[slice.response];
        if (result.standing != Standing::kWeighted) return;
        const int start = result.start;
        const Extremes extremes = of_slices(workspace.extremes, slice);
        int64_t normalized = normalized_sum(slice.first > start ? slice.first : start, slice.last,
                                            workspace.weights + slice.tokens.begin, extremes);
        normalized = reduce_to_first_warp(Sum<int64_t>{normalized}).value;
        if (threadIdx.x == 0) workspace.sums[slice.index].normalized = normalized;
        const auto slices = static_cast<unsigned>(slice.end - slice.begin);
        if (!is_last_block(workspace.arrived + slice.response, slices) || warp_index() > 0) return;
        const ResponseSums sums = of_slices(workspace.sums, slice);
        if (lane_index() > 0) return;
        finish_response(slice.tokens.length, start, extremes, sums, config, result,
                        workspace.scores[slice.response]);
    });
}

// ---- all responses --------------------------------------------------------------------------------------------

// psi of a token of a weighted response (Eq. 8) from its w, which nobody has written before the response's start.
__device__ inline float intra_weight(float weight, int ordinal, const ResponseFocus& response,
                                     const WeightsConfig& config) {
    if (!config.intra || ordinal < response.start) return 0.0f;
    return min_max_normalized(weight, response.low, response.high) - response.mean;
}

// The offset of the released score: the smallest cosine of the batch's weighted responses, at most zero.
__device__ inline float batch_offset(const ResponseFocus* responses, int64_t batch) {
    Extremes extremes = Extremes::of(0.0f);
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) extremes.merge(Extremes::of(responses[i].smallest));
    return block_reduce(extremes).low;
}

// Weights every response of the batch once the tokens are listed and `cos` is complete. The caller puts a grid barrier
// before it reads another response's results. `has_image(response)` says which responses have an image.
template <bool kByOrdinal, typename HasImage>
__device__ void weigh_responses(const Layout& layout, const FocusWorkspace& lists, const WeightsWorkspace& workspace,
                                const float* cos, const WeightsConfig& config, HasImage has_image) {
    __shared__ float kept[kKeptTokens];
    const bool waits = config.needs_batch_offset();
    const bool slices = workspace.scans != nullptr && any_slice(layout, lists);
    // From one side of the grid barrier to the other a block can keep one response.
    const bool keeps = !waits || layout.batch <= static_cast<int64_t>(gridDim.x);
    float offset = config.score_offset;
#pragma unroll 1
    for (int round = 0; round <= static_cast<int>(waits); ++round) {
        if (round == 1) {
            if (!slices) grid_sync();  // slices have had theirs
            offset = batch_offset(workspace.responses, layout.batch);
        }
        for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
            const ResponseTokens tokens = response_tokens(layout, lists, response);
            if (slice_count(tokens.length) > 0) continue;
            ResponseFocus& result = workspace.responses[response];
            float* weights = workspace.weights + tokens.begin;
            float* values = keeps ? kept : weights;
            Inspected found;
            if (round == 0) {
                const int length = has_image(response) ? tokens.length : 0;
                const CosineScan scan = scan_cosines<kByOrdinal>(tokens, 0, length, cos, values);
                if (threadIdx.x == 0) begin_response(scan, tokens.length, result);
                if (waits) continue;
                found = inspected(scan);
            } else {
                found = {result.standing, result.start};
            }
            weigh_response(tokens.length, found, values, offset, config, weights, result, workspace.scores[response]);
        }
        if (round > 0 || !slices) continue;
        scan_slices<kByOrdinal>(layout, lists, workspace, cos, has_image);
        grid_sync();
        search_slices(layout, lists, workspace, config);
    }
    if (slices) weigh_slices(layout, lists, workspace, config, offset);
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

inline int64_t useful_blocks(const VisualWeightsArguments& arguments) {
    const int64_t slices = max_slices(arguments.layout);
    return slices > arguments.layout.batch ? slices : arguments.layout.batch;
}

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
    // A block weighs the responses it has listed, but for slices.
    if (arguments.workspace.scans != nullptr) grid_sync();
    else __syncthreads();
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
    if (!is_last_block(arguments.finished, gridDim.x) || warp_index() > 0) return;
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
