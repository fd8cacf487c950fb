// How a block weighs a response: compensation, the gate, and w (Eq. 5-7, 9).
//
// Cosines say what is weighted: those of a response that are NaN up to the first number belong to tokens that see no
// image yet, and are left out.
//
// Sums that factors depend on are 64-bit fixed-point numbers, minima, maxima and the gate's threshold are exact, so a
// response's weights are the same bits whatever surrounds it. The threshold is found by radix selection, four passes
// over the tail for any length.
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
constexpr int kPasses = 32 / kDigitBits;

// The search for the k-th largest number, digit by digit of its key: each pass counts how many numbers have each next
// digit among those that share the digits found so far.
struct Search {
    unsigned prefix;  // the digits found
    int wanted;       // the rank among the numbers that have them

    __device__ int last_digit() const { return static_cast<int>(prefix & (kDigits - 1)); }
    __device__ float found() const { return order_key_value(static_cast<int32_t>(prefix ^ 0x80000000u)); }
};

// A block counts the next digits of value(0), ..., value(count - 1).
template <typename Value>
__device__ void count_digits(int count, Value value, const Search& search, int pass, int* histogram) {
    const int shift = 32 - (pass + 1) * kDigitBits;
    for_each_loaded<4>(count, value, [&](int, float loaded) {
        const unsigned key = static_cast<unsigned>(order_key(loaded)) ^ 0x80000000u;
        const bool candidate = pass == 0 || (key >> (shift + kDigitBits)) == search.prefix;
        if (candidate) atomicAdd(&histogram[(key >> shift) & (kDigits - 1)], 1);
    });
}

// A warp finds the next digit.
__device__ inline void find_digit(const int* histogram, Search& search) {
    constexpr int kOwn = kDigits / kWarpSize;
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
    const unsigned finders = __ballot_sync(kAllLanes, above < search.wanted && search.wanted <= above + own);
    int digit = 0, rank = 0;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
        const bool found = above < search.wanted && search.wanted <= above + counts[i];
        digit = found ? first + i : digit;
        rank = found ? search.wanted - above : rank;
        above += counts[i];
    }
    const int finder = __ffs(static_cast<int>(finders)) - 1;
    search.prefix = search.prefix << kDigitBits | static_cast<unsigned>(__shfl_sync(kAllLanes, digit, finder));
    search.wanted = __shfl_sync(kAllLanes, rank, finder);
}

// Searches for the k-th largest (k >= 1) of value(0), ..., value(count - 1); every thread of the block gets the result,
// and how many of them are `equal` to it. Every warp looks for the digits by itself, so that a pass has one barrier. The
// caller puts one between two calls.
template <typename Value>
__device__ Search search_largest(int count, int k, Value value, int& equal) {
    alignas(16) __shared__ int histograms[kPasses * kDigits];
    for (int i = threadIdx.x; i < kPasses * kDigits; i += blockDim.x) histograms[i] = 0;
    __syncthreads();
    Search search{0, k};
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        count_digits(count, value, search, pass, histograms + pass * kDigits);
        __syncthreads();
        find_digit(histograms + pass * kDigits, search);
    }
    equal = histograms[(kPasses - 1) * kDigits + search.last_digit()];
    return search;
}

// The same for its value alone.
template <typename Value>
__device__ float kth_largest(int count, int k, Value value) {
    int equal;
    return search_largest(count, k, value, equal).found();
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

// What decides how a response is weighed.
struct Inspected {
    Standing standing;
    int start;
};

__device__ inline Inspected inspected(const CosineScan& scan) {
    // Where all NaNs lead, there are as many as tokens before the first number.
    const bool broken = scan.broken > 0 || scan.nans > scan.first;
    return {scan.first == INT32_MAX ? Standing::kUnweighted
            : broken                ? Standing::kNonfinite
                                    : Standing::kWeighted,
            scan.first};
}

// A block lists the cosines of ordinals [first, last) of a response and looks at them. `cos` is [tokens], or by ordinal
// already, perhaps the very list.
template <bool kByOrdinal>
__device__ CosineScan scan_cosines(const ResponseTokens& tokens, int first, int last, const float* cos,
                                   float* cosines) {
    CosineScan scan = CosineScan::identity();
    for_each_loaded<8>(
        last - first,
        [&](int i) { return cos[kByOrdinal ? tokens.begin + first + i : tokens.token(first + i)]; },
        [&](int i, float value) {
            cosines[first + i] = value;
            const bool nan = value != value, signal = is_signal(value);
            scan.merge({signal ? value : INFINITY, nan ? INT32_MAX : first + i, nan, !nan && !signal});
        });
    return block_reduce(scan);
}

// Notes what a response's cosines say; one thread calls it.
__device__ inline void begin_response(const CosineScan& scan, int length, ResponseFocus& result) {
    const Inspected found = inspected(scan);
    result.standing = found.standing;
    result.smallest = found.standing == Standing::kWeighted ? scan.smallest : INFINITY;
    result.length = length;
    result.start = found.start;
    result.gated = 0;
    result.cos_sum = 0.0;
    result.late_early = NAN;
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
    __device__ void merge(const ResponseSums& other) {
        weight += other.weight;
        normalized += other.normalized;
        cos += other.cos;
        early += other.early;
        late += other.late;
        gated += other.gated;
    }
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

// Where a response's gate may be open: ordinals from `first` on, `top` of them.
struct Tail {
    int first, count, top;
};

__device__ inline Tail tail_of(int count, int start, const WeightsConfig& config) {
    const int share = static_cast<int>(tail_first(count, config)), first = share > start ? share : start;
    return {first, count - first, static_cast<int>(tail_top_count(count - first, config))};
}

// A block computes w of ordinals [begin, end) of a response of `count` tokens (Eq. 5-6). `values` are the cosines, and
// then w; `weights` gets w, too, and may be the same.
__device__ inline void weigh_tokens(int begin, int end, int count, int first, float threshold, float offset,
                                    const WeightsConfig& config, float* values, float* weights, Extremes& extremes,
                                    ResponseSums& sums) {
    const Ramp ramp = ramp_of(count, config);
    const int half = (count + 1) / 2;
    for_each_loaded<4>(
        end - begin, [=](int i) { return values[begin + i]; },
        [&](int i, float cos) {
            const int ordinal = begin + i;
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
}

// A block adds up normalised w of ordinals [begin, end) (Eq. 7).
__device__ inline int64_t normalized_sum(int begin, int end, const float* values, const Extremes& extremes) {
    int64_t sum = 0;
    for_each_loaded<4>(
        end - begin, [=](int i) { return values[begin + i]; },
        [&](int, float weight) {
            sum += to_fixed(min_max_normalized(weight, extremes.low, extremes.high), kUnitScale);
        });
    return sum;
}

// Notes the results of a response (Eq. 9); one thread calls it.
__device__ inline void finish_response(int count, int start, const Extremes& extremes, const ResponseSums& sums,
                                       const WeightsConfig& config, ResponseFocus& result, float& score) {
    const int counted = count - start;
    result.gated = sums.gated;
    result.low = extremes.low;
    result.high = extremes.high;
    result.mean = mean_from_fixed(sums.normalized, kUnitScale, counted);
    result.cos_sum = sums.cos;
    result.late_early = late_early_ratio(sums.early, sums.late, start, (count + 1) / 2, count);
    score = accumulated_score(sums.weight, sums.normalized, counted, config);
}

// A block weighs a response of `count` tokens. Tokens before the start are left out.
__device__ inline void weigh_response(int count, Inspected response, float* values, float offset,
                                      const WeightsConfig& config, float* weights, ResponseFocus& result,
                                      float& score) {
    if (response.standing != Standing::kWeighted) {
        if (threadIdx.x == 0) score = NAN;
        return;
    }
    const Tail tail = tail_of(count, response.start, config);
    float threshold = INFINITY;
    if (config.gate && tail.top > 0) {
        threshold = kth_largest(tail.count, tail.top, [=](int i) { return values[tail.first + i]; });
    }
    Extremes extremes = Extremes::identity();
    ResponseSums sums = ResponseSums::identity();
    weigh_tokens(response.start, count, count, tail.first, threshold, offset, config, values, weights, extremes, sums);
    extremes = block_reduce(extremes);
    sums.normalized = normalized_sum(response.start, count, values, extremes);
    sums = reduce_to_first_warp(sums);
    if (threadIdx.x == 0) finish_response(count, response.start, extremes, sums, config, result, score);
}

}  // namespace cuda
}  // namespace vgpo
