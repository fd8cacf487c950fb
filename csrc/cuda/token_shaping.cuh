// From per-token signals to weights of tokens and of responses: the family of perception-aware methods.
//
// A block takes a response of any length and lists its signals by ordinal. Then it goes over them once for their sum,
// once or twice for weights (a gate, a softmax), once for a fused score, and four times for each selection: a radix
// search finds the score at which it ends, and of tokens with that very score the first ones are counted off. One grid
// barrier lies before what compares responses and before the metrics. Where a selection is among the tokens of a group
// or of the batch, all blocks count digits into histograms of its segment, with a barrier behind each of the four
// passes: five barriers in all.
//
// Sums are 64-bit fixed-point numbers whose scale depends on the response's signals alone, and counts are integers, so
// results are the same bits whatever surrounds a response and whoever adds first.
//
// For 8 responses of 2,048 tokens, expected, not measured: nine to eleven passes bound by latency and a barrier, 18-22
// us, for a selection within a response (VPPO) or a softmax (PEPO); 35-40 us for two selections among all tokens of the
// batch (ToR). A response of 32,768 tokens keeps one block busy for 90-120 us.
#pragma once

#include "response_factors.cuh"

namespace vgpo {
namespace cuda {

// ---- what is known of a response ------------------------------------------------------------------------------

// Where a selection ends: of tokens that have the threshold for a score, those up to the ordinal `last` are selected.
struct Cut {
    float threshold;
    int32_t last;  // from the first token that counts

    __device__ bool takes(float score, int ordinal) const {
        return score > threshold || (score == threshold && ordinal <= last);
    }
};

constexpr int kToTheEnd = INT32_MAX;

// The tokens that a selection is made from.
struct ShapingSegment {
    int64_t leader;   // its first response; 0 if it is the batch
    int64_t counted;  // tokens
};

struct ResponseShaping {
    int32_t start;        // leading tokens that saw no image: no statistic counts them
    int32_t counted;      // those after them; 0 for a response that is left as it is
    bool broken;          // a signal is not finite
    float scale, rest;    // a token's weight is its raw one times this, plus that
    Cut visual, entropy;  // of selections within a response
    int32_t selected;     // counted tokens
    double signal;        // sum of the visual one
    ShapingSegment segment;
};

// What is found of a response's signals in one look.
struct SignalScan {
    int32_t first;   // ordinal of the first visual signal that is not NaN
    int32_t nans;    // of the visual signal
    int32_t broken;  // the last ordinal with another signal that is not finite
    Extremes visual, entropy, gap;  // of finite visual signals, and where those are

    __device__ static SignalScan identity() {
        return {INT32_MAX, 0, -1, Extremes::identity(), Extremes::identity(), Extremes::identity()};
    }
    __device__ void merge(const SignalScan& other) {
        first = other.first < first ? other.first : first;
        nans += other.nans;
        broken = other.broken > broken ? other.broken : broken;
        visual.merge(other.visual);
        entropy.merge(other.entropy);
        gap.merge(other.gap);
    }
};

__device__ inline SignalScan warp_reduce(const SignalScan& scan) {
    return {warp_min(scan.first),     warp_sum(scan.nans),       -warp_min(-scan.broken),
            warp_reduce(scan.visual), warp_reduce(scan.entropy), warp_reduce(scan.gap)};
}

// ---- arguments ------------------------------------------------------------------------------------------------

struct ShapingWorkspace {
    // [tokens] by ordinal, those of a response from its token_begin on:
    float* visual = nullptr;   // the signal, and then the score that the visual selection goes by
    float* entropy = nullptr;  // where given, as gap
    float* gap = nullptr;
    float* weights = nullptr;  // raw ones, where the config makes some
    ResponseShaping* responses = nullptr;  // [B]
    unsigned* finished = nullptr;          // [] blocks
    // Where a selection is not within a response, of the visual one and of that by entropy:
    int* histograms = nullptr;   // [2, segments, kPasses, kDigits]
    int* last_digits = nullptr;  // [2, B, kDigits] of each response's own, in the last pass
};

struct TokenShapingArguments {
    Layout layout;
    const float* visual;   // [tokens]
    const float* entropy;  // [tokens], or null, as gap
    const float* gap;
    const bool* response_mask;  // [tokens]
    const int64_t* group_ids;   // [B]
    float progress;
    ShapingConfig config;
    FocusWorkspace lists;  // of tokens alone
    ShapingWorkspace workspace;
    float* factors;  // [tokens], as weights and selected
    float* weights;
    bool* selected;
    float* response_factor;  // [B], as score
    float* score;
    float* metrics;  // [kShapingMetrics]

    // Whether tokens are selected among those of other responses, too.
    __host__ __device__ bool pools() const {
        return config.selects() && config.scope != SelectionScope::kResponse;
    }
    // Slots for what is counted of a segment: a group has that of its first response.
    __host__ __device__ int64_t segments() const { return config.scope == SelectionScope::kBatch ? 1 : layout.batch; }
    __device__ int* histograms_of(int selection, int64_t segment) const {
        return workspace.histograms + (selection * segments() + segment) * kPasses * kDigits;
    }
    __device__ int* last_digits_of(int selection, int64_t response) const {
        return workspace.last_digits + (selection * layout.batch + response) * kDigits;
    }
    __device__ double fraction(int selection) const {
        return selection == 0 ? config.top_visual : config.top_entropy;
    }
    __device__ const float* scores(int selection) const {
        return selection == 0 ? workspace.visual : workspace.entropy;
    }
};

inline void bind(TokenShapingArguments& arguments, Arena& arena) {
    const Layout& layout = arguments.layout;
    ShapingWorkspace& workspace = arguments.workspace;
    const int64_t tokens = layout.num_tokens();
    bind_tokens(arguments.lists, arena, layout);
    workspace.responses = arena.take<ResponseShaping>("responses", layout.batch);
    workspace.finished = arena.take<unsigned>("finished", 1);
    workspace.visual = arena.take<float>("signals", tokens);
    if (arguments.entropy != nullptr) workspace.entropy = arena.take<float>("entropies", tokens);
    if (arguments.gap != nullptr) workspace.gap = arena.take<float>("gaps", tokens);
    const TokenWeight weight = arguments.config.weight;
    if (weight == TokenWeight::kSoftmax || weight == TokenWeight::kGate) {
        workspace.weights = arena.take<float>("raw_weights", tokens);
    }
    if (!arguments.pools()) return;
    workspace.histograms = arena.take<int>("histograms", 2 * arguments.segments() * kPasses * kDigits);
    workspace.last_digits = arena.take<int>("last_digits", 2 * layout.batch * kDigits);
}

inline int64_t useful_blocks(const TokenShapingArguments& arguments) { return arguments.layout.batch; }

// ---- signals --------------------------------------------------------------------------------------------------

// A block lists the signals of a response and looks at them.
__device__ inline SignalScan scan_signals(const TokenShapingArguments& arguments, const ResponseTokens& tokens) {
    const ShapingWorkspace& workspace = arguments.workspace;
    float* const visual = workspace.visual + tokens.begin;
    const bool has_entropy = arguments.entropy != nullptr, has_gap = arguments.gap != nullptr;
    // What is not given is read as the visual signal, so that no condition stands between the loads.
    const float* const entropies = has_entropy ? arguments.entropy : arguments.visual;
    const float* const gaps = has_gap ? arguments.gap : arguments.visual;
    struct Loaded {
        float visual, entropy, gap;
    };
    SignalScan scan = SignalScan::identity();
    for_each_loaded<4>(
        tokens.length,
        [&](int i) {
            const int64_t token = tokens.token(i);
            return Loaded{arguments.visual[token], entropies[token], gaps[token]};
        },
        [&](int i, const Loaded& loaded) {
            visual[i] = loaded.visual;
            if (has_entropy) workspace.entropy[tokens.begin + i] = loaded.entropy;
            if (has_gap) workspace.gap[tokens.begin + i] = loaded.gap;
            const bool nan = loaded.visual != loaded.visual, counts = is_finite(loaded.visual);
            const bool good = (nan | counts) & (!has_entropy | is_finite(loaded.entropy)) &
                              (!has_gap | is_finite(loaded.gap));
            scan.first = !nan && i < scan.first ? i : scan.first;
            scan.nans += nan;
            scan.broken = good ? scan.broken : i;  // i rises
            if (!counts) return;
            scan.visual.merge(Extremes::of(loaded.visual));
            scan.entropy.merge(Extremes::of(loaded.entropy));
            scan.gap.merge(Extremes::of(loaded.gap));
        });
    return block_reduce(scan);
}

__device__ inline ResponseShaping begin_shaping(const SignalScan& scan, int length) {
    ResponseShaping shaping = {};
    shaping.start = scan.first == INT32_MAX ? length : scan.first;
    // Where all NaNs lead, there are as many as tokens before the first number.
    shaping.broken = shaping.start < length && (scan.nans > scan.first || scan.broken >= scan.first);
    shaping.counted = shaping.broken ? 0 : length - shaping.start;
    shaping.rest = 1.0f;
    return shaping;
}

// Fixed-point sums over a response.
struct SignalSums {
    int64_t visual;
    int64_t mixed;  // of the normalised visual signal and entropy, kUnitScale

    __device__ static SignalSums identity() { return {0, 0}; }
    __device__ void merge(const SignalSums& other) {
        visual += other.visual;
        mixed += other.mixed;
    }
};

// A block makes raw weights of a response, and notes how they become weights. What it has listed before is visible.
__device__ inline void weigh_signals(const TokenShapingArguments& arguments, const ResponseTokens& tokens,
                                     const SignalScan& scan, ResponseShaping& shaping) {
    const ShapingConfig& config = arguments.config;
    const float floor = config.range_floor;
    const int count = shaping.counted;
    const int64_t first = tokens.begin + shaping.start;
    const float* const visual = arguments.workspace.visual + first;
    const bool gates_by_entropy = config.gates_by_entropy();
    const float* const entropy = gates_by_entropy ? arguments.workspace.entropy + first : visual;
    struct Loaded {
        float visual, entropy;
    };
    const auto load = [=](int i) { return Loaded{visual[i], entropy[i]}; };
    const auto mixed = [&](const Loaded& loaded) {
        return normalized_in(loaded.visual, scan.visual.low, scan.visual.high, floor) +
               normalized_in(loaded.entropy, scan.entropy.low, scan.entropy.high, floor);
    };
    const double scale = fixed_scale_of(largest_of(scan.visual));
    SignalSums sums = SignalSums::identity();
    for_each_loaded<4>(count, load, [&](int, const Loaded& loaded) {
        sums.merge({to_fixed(loaded.visual, scale), gates_by_entropy ? to_fixed(mixed(loaded), kUnitScale) : 0});
    });
    sums = block_reduce(sums);
    shaping.signal = static_cast<double>(sums.visual) / scale;
    if (arguments.workspace.weights == nullptr) return;
    float* const raw = arguments.workspace.weights + first;
    int64_t mass = 0;
    double mass_scale = kUnitScale;
    if (config.weight == TokenWeight::kSoftmax) {
        const float mean = mean_from_fixed(sums.mixed, kUnitScale, count);
        Extremes powers = Extremes::identity();
        for_each_loaded<4>(count, load, [&](int i, const Loaded& loaded) {
            const float power = softmax_power(loaded.visual, mixed(loaded), mean, config);
            raw[i] = power;
            powers.merge(Extremes::of(power));
        });
        powers = block_reduce(powers);
        for_each_loaded<4>(count, [=](int i) { return raw[i]; }, [&](int i, float power) {
            const float share = exponential(power - powers.high);
            raw[i] = share;
            mass += to_fixed(share, kUnitScale);
        });
    } else {
        const float low = gated_signal(scan.visual.low, config), high = gated_signal(scan.visual.high, config);
        // The gate rises but where a floor above 1 ends, so that no weight exceeds the larger one of both ends.
        mass_scale = fixed_scale_of(maximum(gate_weight(normalized_in(low, low, high, floor), config),
                                            gate_weight(normalized_in(high, low, high, floor), config)));
        for_each_loaded<4>(count, load, [&](int i, const Loaded& loaded) {
            const float unit = normalized_in(gated_signal(loaded.visual, config), low, high, floor);
            const float weight = gate_weight(unit, config);
            raw[i] = weight;
            mass += to_fixed(weight, mass_scale);
        });
        if (!config.conserve) {
            shaping.scale = 1.0f;
            shaping.rest = 0.0f;
            return;
        }
    }
    const double total = static_cast<double>(block_sum(mass)) / mass_scale;
    const bool empty = !(total > static_cast<double>(kMassFloor));
    shaping.scale = empty ? 0.0f : static_cast<float>(static_cast<double>(count) / total);
    shaping.rest = empty ? 1.0f : 0.0f;
}

// A block puts the score that the visual selection goes by in the place of the signal.
__device__ inline void score_signals(const TokenShapingArguments& arguments, const ResponseTokens& tokens,
                                     const SignalScan& scan, const ResponseShaping& shaping) {
    const ShapingConfig& config = arguments.config;
    const float floor = config.range_floor;
    const bool fuses = config.fuses(), times_entropy = config.times_entropy;
    if (!fuses && !times_entropy) return;
    const int64_t first = tokens.begin + shaping.start;
    float* const scores = arguments.workspace.visual + first;
    const float* const gap = fuses ? arguments.workspace.gap + first : scores;
    const float* const entropy = times_entropy ? arguments.workspace.entropy + first : scores;
    struct Loaded {
        float visual, entropy, gap;
    };
    for_each_loaded<4>(
        shaping.counted, [=](int i) { return Loaded{scores[i], entropy[i], gap[i]}; },
        [&](int i, const Loaded& loaded) {
            float score = loaded.visual;
            if (fuses) {
                score = soft_or(normalized_in(score, scan.visual.low, scan.visual.high, floor),
                                normalized_in(loaded.gap, scan.gap.low, scan.gap.high, floor), config);
            }
            if (times_entropy) score *= normalized_in(loaded.entropy, scan.entropy.low, scan.entropy.high, floor);
            scores[i] = score;
        });
}

// ---- selections -----------------------------------------------------------------------------------------------

// The ordinal of the n-th of the scores that equal the threshold, of which there are so many, to every thread of the
// block.
__device__ inline int ordinal_of_equal(const float* scores, int count, float threshold, int n) {
    __shared__ int found;
    const int step = static_cast<int>(blockDim.x);
    for (int base = 0, before = 0; base < count; base += step) {
        const int own = base + static_cast<int>(threadIdx.x);
        const int equal = own < count && scores[own] == threshold;
        const int here = __syncthreads_count(equal);
        if (before + here < n) {
            before += here;
            continue;
        }
        if (before + block_inclusive_sum(equal) == n && equal != 0) found = own;
        __syncthreads();
        break;
    }
    return found;
}

// A block makes a selection within a response.
__device__ inline Cut cut_in_response(const float* scores, int count, double fraction) {
    __syncthreads();  // for the scores, and for the histograms of a search before
    int equal;
    const auto wanted = static_cast<int>(top_count(count, fraction));
    const Search search = search_largest(count, wanted, [=](int i) { return scores[i]; }, equal);
    const float threshold = search.found();
    if (search.wanted == equal) return {threshold, kToTheEnd};
    return {threshold, ordinal_of_equal(scores, count, threshold, search.wanted)};
}

__device__ inline bool same_segment(const TokenShapingArguments& arguments, int64_t one, int64_t other) {
    return arguments.config.scope == SelectionScope::kBatch || arguments.group_ids[one] == arguments.group_ids[other];
}

// A warp looks for the segment of a response. The first one of the batch leads a segment that is the batch.
__device__ inline ShapingSegment segment_of(const TokenShapingArguments& arguments, int64_t response) {
    int first = INT32_MAX;
    int64_t counted = 0;
    for (int64_t i = lane_index(); i < arguments.layout.batch; i += kWarpSize) {
        const int32_t tokens = arguments.workspace.responses[i].counted;
        if (!same_segment(arguments, response, i)) continue;
        first = static_cast<int>(i) < first ? static_cast<int>(i) : first;
        counted += tokens;
    }
    return {warp_min(first), warp_sum(counted)};
}

// The search in a segment after so many passes.
__device__ inline Search search_in(const TokenShapingArguments& arguments, int selection,
                                   const ShapingSegment& segment, int passes) {
    const int* histograms = arguments.histograms_of(selection, segment.leader);
    Search search{0, static_cast<int>(top_count(segment.counted, arguments.fraction(selection)))};
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) find_digit(histograms + pass * kDigits, search);
    return search;
}

// The four passes of selections among tokens of several responses, each with a grid barrier behind it.
__device__ inline void search_segments(const TokenShapingArguments& arguments) {
    __shared__ int counts[kDigits];
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        for (int64_t response = blockIdx.x; response < arguments.layout.batch; response += gridDim.x) {
            ResponseShaping& shaping = arguments.workspace.responses[response];
            const int counted = shaping.counted;
            if (counted == 0) continue;
            const ShapingSegment segment = pass == 0 ? segment_of(arguments, response) : shaping.segment;
            if (pass == 0 && threadIdx.x == 0) shaping.segment = segment;
            const int64_t first = arguments.layout.token_begin(response) + shaping.start;
#pragma unroll 1
            for (int selection = 0; selection < 2; ++selection) {
                if (arguments.fraction(selection) == 0.0) continue;
                const Search search = search_in(arguments, selection, segment, pass);
                const float* scores = arguments.scores(selection) + first;
                for (int i = threadIdx.x; i < kDigits; i += blockDim.x) counts[i] = 0;
                __syncthreads();
                count_digits(counted, [=](int i) { return scores[i]; }, search, pass, counts);
                __syncthreads();
                int* histogram = arguments.histograms_of(selection, segment.leader) + pass * kDigits;
                int* last_digits = arguments.last_digits_of(selection, response);
                // A thread sets back later what it reads here.
                for (int i = threadIdx.x; i < kDigits; i += blockDim.x) {
                    if (counts[i] > 0) atomicAdd(&histogram[i], counts[i]);
                    if (pass == kPasses - 1) last_digits[i] = counts[i];
                }
            }
        }
        grid_sync();
    }
}

// A block finds where a selection among tokens of several responses ends in one of them.
__device__ inline Cut cut_in_segment(const TokenShapingArguments& arguments, int selection, int64_t response,
                                     const ResponseShaping& shaping) {
    const Search search = search_in(arguments, selection, shaping.segment, kPasses);
    const float threshold = search.found();
    const int digit = search.last_digit();
    const int* histograms = arguments.histograms_of(selection, shaping.segment.leader);
    if (search.wanted == histograms[(kPasses - 1) * kDigits + digit]) return {threshold, kToTheEnd};
    int before = 0;  // equal scores of earlier responses
    for (int64_t i = lane_index(); i < response; i += kWarpSize) {
        if (arguments.workspace.responses[i].counted == 0 || !same_segment(arguments, response, i)) continue;
        before += arguments.last_digits_of(selection, i)[digit];
    }
    const int left = search.wanted - warp_sum(before);
    if (left <= 0) return {threshold, -1};
    if (left >= arguments.last_digits_of(selection, response)[digit]) return {threshold, kToTheEnd};
    const int64_t first = arguments.layout.token_begin(response) + shaping.start;
    return {threshold, ordinal_of_equal(arguments.scores(selection) + first, shaping.counted, threshold, left)};
}

// ---- a response, before and after the grid barrier ------------------------------------------------------------

// A block does for a response all that needs no other.
__device__ inline void begin_response(const TokenShapingArguments& arguments, int64_t response) {
    const ShapingConfig& config = arguments.config;
    float *const factors = arguments.factors, *const weights = arguments.weights;
    bool* const selected = arguments.selected;
    index_tokens(arguments.layout, arguments.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                 response, [=](int64_t token) {
                     factors[token] = weights[token] = 1.0f;
                     selected[token] = false;
                 });
    __syncthreads();
    const ResponseTokens tokens = response_tokens(arguments.layout, arguments.lists, response);
    const SignalScan scan = scan_signals(arguments, tokens);
    ResponseShaping shaping = begin_shaping(scan, tokens.length);
    if (shaping.counted > 0) {
        weigh_signals(arguments, tokens, scan, shaping);
        score_signals(arguments, tokens, scan, shaping);
        if (config.scope == SelectionScope::kResponse) {
            const int64_t first = tokens.begin + shaping.start;
            if (config.top_visual > 0.0) {
                shaping.visual = cut_in_response(arguments.scores(0) + first, shaping.counted, config.top_visual);
            }
            if (config.top_entropy > 0.0) {
                shaping.entropy = cut_in_response(arguments.scores(1) + first, shaping.counted, config.top_entropy);
            }
        }
    }
    if (threadIdx.x == 0) {
        arguments.workspace.responses[response] = shaping;
        arguments.score[response] = shaping.counted > 0 ? static_cast<float>(shaping.signal / shaping.counted) : NAN;
    }
    if (!arguments.pools() || response >= arguments.segments()) return;
    for (int selection = 0; selection < 2; ++selection) {
        int* const histograms = arguments.histograms_of(selection, response);
        for (int i = threadIdx.x; i < kPasses * kDigits; i += blockDim.x) histograms[i] = 0;
    }
}

// A block writes what a response's tokens get.
__device__ inline void finish_response(const TokenShapingArguments& arguments, int64_t response, float factor) {
    const ShapingConfig& config = arguments.config;
    ResponseShaping shaping = arguments.workspace.responses[response];
    const ResponseTokens tokens = response_tokens(arguments.layout, arguments.lists, response);
    const bool selects = config.selects(), top_visual = config.top_visual > 0.0, top_entropy = config.top_entropy > 0.0;
    if (arguments.pools() && shaping.counted > 0) {
        if (top_visual) shaping.visual = cut_in_segment(arguments, 0, response, shaping);
        if (top_entropy) shaping.entropy = cut_in_segment(arguments, 1, response, shaping);
    }
    const SharedWeights shared =
        shared_weights(shaping.counted, top_count(shaping.counted, config.top_visual), config);
    const bool shares = config.weight == TokenWeight::kShare;
    // What there is not is read as the visual score, which nobody uses then.
    const float* const visual = arguments.workspace.visual + tokens.begin;
    const float* const entropy = top_entropy ? arguments.workspace.entropy + tokens.begin : visual;
    const bool weighed = arguments.workspace.weights != nullptr;
    const float* const raw = weighed ? arguments.workspace.weights + tokens.begin : visual;
    const int first = shaping.counted > 0 ? shaping.start : tokens.length;
    struct Loaded {
        int64_t token;
        float visual, entropy, raw;
    };
    int number = 0;
    for_each_loaded<4>(
        tokens.length, [=](int i) { return Loaded{tokens.token(i), visual[i], entropy[i], raw[i]}; },
        [&](int i, const Loaded& loaded) {
            float weight = 1.0f;
            bool chosen = true, by_visual = false;
            if (i >= first) {
                by_visual = top_visual ? shaping.visual.takes(loaded.visual, i - first) : !selects;
                const bool by_entropy = top_entropy && shaping.entropy.takes(loaded.entropy, i - first);
                chosen = by_visual || by_entropy;
                weight = weighed ? loaded.raw * shaping.scale + shaping.rest : 1.0f;
                if (shares) weight = by_visual ? shared.chosen : shared.others;
                else if (selects) weight *= selection_weight(by_visual, by_entropy, config);
                weight = faded_in(weight, arguments.progress, config);
                number += chosen;
            }
            const bool has_factor = config.response_on == Weighed::kAll || by_visual;
            arguments.weights[loaded.token] = weight;
            arguments.factors[loaded.token] = has_factor ? weight * factor : weight;
            arguments.selected[loaded.token] = chosen;
        });
    number = block_sum(number);
    if (threadIdx.x != 0) return;
    arguments.workspace.responses[response].selected = number;
    arguments.response_factor[response] = factor;
}

// ---- metrics --------------------------------------------------------------------------------------------------

struct ShapingTotals {
    double signal;
    int64_t counted, selected;
    int32_t shaped, broken;

    __device__ static ShapingTotals identity() { return {0.0, 0, 0, 0, 0}; }
    __device__ void merge(const ShapingTotals& other) {
        signal += other.signal;
        counted += other.counted;
        selected += other.selected;
        shaped += other.shaped;
        broken += other.broken;
    }
};

// A warp adds up what responses bring. metrics: [kShapingMetrics].
__device__ inline void write_shaping_metrics(const ResponseShaping* responses, int64_t batch, float* metrics) {
    ShapingTotals totals = ShapingTotals::identity();
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) {
        const ResponseShaping& response = responses[i];
        totals.merge({response.signal, response.counted, response.selected, response.counted > 0, response.broken});
    }
    totals = warp_reduce(totals);
    if (lane_index() != 0) return;
    const auto counted = static_cast<double>(totals.counted);  // the mean of nothing is NaN
    metrics[kSignalMean] = static_cast<float>(totals.signal / counted);
    metrics[kSelectedRate] = static_cast<float>(static_cast<double>(totals.selected) / counted);
    metrics[kShapedResponses] = static_cast<float>(totals.shaped);
    metrics[kNonfiniteSignals] = static_cast<float>(totals.broken);
}

// ---- kernel ---------------------------------------------------------------------------------------------------

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    token_shaping_kernel(const __grid_constant__ TokenShapingArguments arguments) {
    const Layout& layout = arguments.layout;
    if (blockIdx.x == 0 && threadIdx.x == 0) *arguments.workspace.finished = 0;
    prefetch_tokens(arguments.visual, layout.num_tokens());
    prefetch_tokens(arguments.entropy, layout.num_tokens());
    prefetch_tokens(arguments.gap, layout.num_tokens());
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        begin_response(arguments, response);
    }
    grid_sync();
    if (arguments.pools()) search_segments(arguments);
    for_each_response(arguments.score, arguments.group_ids, layout.batch, arguments.progress, arguments.config,
                      [&](int64_t response, float factor) { finish_response(arguments, response, factor); });
    if (!is_last_block(arguments.workspace.finished, gridDim.x) || warp_index() > 0) return;
    write_shaping_metrics(arguments.workspace.responses, layout.batch, arguments.metrics);
}

}  // namespace cuda
}  // namespace vgpo
