// Visual prototypes, and the cosine of every response token with its image's prototype (Eq. 3-4).
//
// Memory traffic: each visual row and each scored response row is read once, 2 D bytes per row in half precision, and
// nothing else counts. At D = 3584 with 8 responses of 1,024 image and 2,048 response tokens that is 176 MB, 41 us at
// a copy bandwidth of 4.3 TB/s. A multiprocessor needs some 30 KB in flight to sustain that (bandwidth times latency
// over 132): 16 warps with eight 16-byte loads per lane have 64 KB.
//
// Masks leave work scattered, so the first phase lists the rows that count and later phases share the lists out over
// all warps of a persistent grid. Everything downstream sees ordinals, not positions: padding, packing and holes do
// not change a bit.
//
// With `causal` a token sees the visual rows before it. Scored tokens of a response that see the same rows are a level.
// The later phases then run once for each level, of all responses at a time, and add to a response's sum the rows that
// its level sees more than the one before: still each row is read once, and rows after the last scored token never.
// Where every image comes before the response there is one level, and the bits are those without `causal`. A level
// costs two grid barriers: some microseconds for each image that arrives late.
//
// For means of cosines a kernel before this one leaves what makes unit vectors of the visual rows, which then are read
// twice: at the shape above 59 MB more, much of it from the cache.
#pragma once

#include "vector.cuh"
#include "workspace.h"

namespace vgpo {
namespace cuda {

// What the kernels read. T is float, __half or __nv_bfloat16.
template <typename T>
struct FocusInput {
    const T* hidden;                 // [B, S, D] or [N, D], with `strides`
    HiddenStrides strides;
    int dim;                         // D
    bool aligned;                    // rows (and given prototypes) are whole, aligned 16-byte vectors
    Layout layout;
    const bool* visual_mask;         // [rows]; null where prototypes are given
    const bool* response_mask;       // [tokens]
    const float* given_prototypes;   // [P, D], or null: average the visual rows
    const int64_t* prototype_index;  // [B] or [tokens], or null: response b has row b
    bool index_per_token;            // prototype_index is [tokens]
    int64_t num_given;               // P
    bool causal;                     // never with given prototypes
    const float* inverse_norms;      // [rows] of the visual rows, read by the kernels of unit vectors

    __device__ const T* row(int64_t response, int64_t row_index) const {
        return hidden + strides.offset(layout, response, row_index);
    }

    // The given prototype of a token; null without an image.
    __device__ const float* given_prototype(int64_t response, int64_t token) const {
        int64_t row = prototype_index == nullptr ? response : prototype_index[index_per_token ? token : response];
        row = row < num_given ? row : num_given - 1;
        return row < 0 ? nullptr : given_prototypes + row * dim;
    }
};

// Consecutive entries of a list of a response.
struct alignas(8) Ordinals {
    int32_t begin, end;

    __device__ int size() const { return end - begin; }
};

struct alignas(16) Level {
    Ordinals rows;    // visual rows that its tokens see and those of the level before did not
    Ordinals tokens;  // scored tokens
};

struct FocusWorkspace {
    int32_t* visual_index = nullptr;  // [rows] rows under the visual mask, relative to their response's first
    int32_t* visual_count = nullptr;  // [B] their number
    int32_t* token_index = nullptr;   // [tokens] tokens under the response mask, relative to their response's first
    int32_t* token_count = nullptr;   // [B]
    float* row_sums = nullptr;        // [slots, D] sums of consecutive visual rows
    float* prototypes = nullptr;      // [B, D] means of the visual rows
    // With `causal` alone:
    Level* levels = nullptr;          // [2, B] of this pass and the next, which take turns
    double* totals = nullptr;         // [B, D] sums of the visual rows of all levels so far

    __device__ Ordinals visual_rows(const Level* of_pass, int64_t response) const {
        return of_pass == nullptr ? Ordinals{0, visual_count[response]} : of_pass[response].rows;
    }
    __device__ Ordinals tokens(const Level* of_pass, int64_t response) const {
        return of_pass == nullptr ? Ordinals{0, token_count[response]} : of_pass[response].tokens;
    }
};

// ---- the shape of the first reduction -------------------------------------------------------------------------
//
// The visual rows of a response (of its level) are summed in runs of consecutive ordinals, then the runs are summed in
// order. The run length depends on the number of rows alone, so the bits do not depend on batch, layout or device, nor
// on what comes after the level.

constexpr int kRunRows = 32;
constexpr int kMaxRuns = 256;  // a longer response gets longer runs, not more

constexpr __host__ __device__ int run_rows(int count) { return kRunRows * ceil_div(count, kRunRows * kMaxRuns); }

constexpr __host__ __device__ int run_count(int count) { return count == 0 ? 0 : ceil_div(count, run_rows(count)); }

// The most runs a batch can have.
inline int64_t max_runs(const Layout& layout) {
    const int64_t capped = layout.batch * kMaxRuns;
    const int64_t by_rows = layout.cu_seqlens == nullptr ? layout.batch * ceil_div<int64_t>(layout.rows, kRunRows)
                                                         : layout.rows / kRunRows + layout.batch;
    return by_rows < capped ? by_rows : capped;
}

// Arrays that the visual rows need.
inline void bind_image(FocusWorkspace& workspace, Arena& arena, const Layout& layout, int64_t dim) {
    workspace.visual_count = arena.take<int32_t>("visual_count", layout.batch);
    workspace.visual_index = arena.take<int32_t>("visual_index", layout.num_rows());
    workspace.row_sums = arena.take<float>("row_sums", max_runs(layout) * dim);
}

inline void bind_tokens(FocusWorkspace& workspace, Arena& arena, const Layout& layout) {
    workspace.token_count = arena.take<int32_t>("token_count", layout.batch);
    workspace.token_index = arena.take<int32_t>("token_index", layout.num_tokens());
}

// Everything that focus_cosines needs.
template <typename T>
void bind_focus(FocusWorkspace& workspace, Arena& arena, const FocusInput<T>& input) {
    const Layout& layout = input.layout;
    bind_tokens(workspace, arena, layout);
    if (input.given_prototypes != nullptr) return;
    bind_image(workspace, arena, layout, input.dim);
    workspace.prototypes = arena.take<float>("prototypes", layout.batch * input.dim);
    if (!input.causal) return;
    workspace.levels = arena.take<Level>("levels", 2 * layout.batch);
    workspace.totals = arena.take<double>("totals", layout.batch * input.dim);
}

// ---- levels ---------------------------------------------------------------------------------------------------

// The first of the rising numbers list[begin, end) that is not below `value`; `end` where there is none.
__device__ inline int lower_bound(const int32_t* list, int begin, int end, int value) {
    if (begin == end || list[end - 1] < value) return end;  // as a rule: every image comes first
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (list[middle] < value) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

// The level of a response after `previous`; without tokens where there is none.
__device__ inline Level next_level(const Layout& layout, const FocusWorkspace& workspace, int64_t response,
                                   const Level& previous) {
    const int32_t* rows = workspace.visual_index + layout.row_begin(response);
    const int32_t* tokens = workspace.token_index + layout.token_begin(response);
    const int num_rows = workspace.visual_count[response], num_tokens = workspace.token_count[response];
    const int seen = previous.rows.end, first = previous.tokens.end;
    if (first >= num_tokens) return {{seen, seen}, {first, first}};
    // From a token's place in its response to its row's.
    const int shift = layout.cu_seqlens == nullptr ? static_cast<int>(layout.rows - layout.tokens) : 0;
    const int visible = lower_bound(rows, seen, num_rows, tokens[first] + shift);
    const int last = visible == num_rows ? num_tokens  // a token on the next visual row does not see it yet
                                         : lower_bound(tokens, first + 1, num_tokens, rows[visible] - shift + 1);
    return {{seen, visible}, {first, last}};
}

// A block finds the first level of a response that it has listed. Tokens before it see nothing: NaN.
template <bool kByOrdinal>
__device__ void find_first_level(const Layout& layout, const FocusWorkspace& workspace, int64_t response,
                                        float* cos) {
    Level level = next_level(layout, workspace, response, {});
    if (level.rows.end == 0) {
        const int64_t begin = layout.token_begin(response);
        for (int ordinal = threadIdx.x; ordinal < level.tokens.end; ordinal += blockDim.x) {
            cos[begin + (kByOrdinal ? ordinal : workspace.token_index[begin + ordinal])] = NAN;
        }
        level = next_level(layout, workspace, response, level);
    }
    if (threadIdx.x == 0) workspace.levels[response] = level;
}

// One thread of a block finds a response's next level, the last one: its warp has the least to do meanwhile.
__device__ inline void find_next_levels(const Layout& layout, const FocusWorkspace& workspace, const Level* levels,
                                        Level* next) {
    if (threadIdx.x != blockDim.x - 1) return;
    for (int64_t response = blockIdx.x; response < layout.batch; response += gridDim.x) {
        next[response] = next_level(layout, workspace, response, levels[response]);
    }
}

// Whether a response has a level, to every thread of the block.
__device__ inline bool any_level(const Level* levels, int64_t batch) {
    bool any = false;
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) any |= levels[i].tokens.size() > 0;
    return __syncthreads_or(any) != 0;
}

// ---- phase one: list the rows ---------------------------------------------------------------------------------

// Whether a response begins where none before it reaches. Boundaries that do not rise would make more rows than there
// are, and nobody has looked at them: such a response is taken as empty. Whole warps call this.
__device__ inline bool is_in_order(const Layout& layout, int64_t response) {
    if (layout.cu_seqlens == nullptr) return true;
    const int64_t begin = layout.boundary(response);
    bool rises = true;
    for (int64_t i = lane_index(); i < response; i += kWarpSize) rises &= layout.boundary(i) <= begin;
    return __all_sync(kAllLanes, rises) != 0;
}

// A block lists the visual rows of a response.
template <typename T>
__device__ void index_image(const FocusInput<T>& input, const FocusWorkspace& workspace, int64_t response) {
    const int64_t begin = input.layout.row_begin(response);
    const int64_t end = is_in_order(input.layout, response) ? input.layout.row_end(response) : begin;
    const int count = compact_mask(input.visual_mask, begin, end, workspace.visual_index, [](int64_t) {});
    if (threadIdx.x == 0) workspace.visual_count[response] = count;
}

// A block lists the scored tokens of a response.
template <typename OffMask>
__device__ int index_tokens(const Layout& layout, const bool* response_mask, int32_t* token_index,
                            int32_t* token_count, int64_t response, OffMask off_mask) {
    const int64_t begin = layout.token_begin(response);
    const int64_t end = is_in_order(layout, response) ? layout.token_end(response) : begin;
    const int count = compact_mask(response_mask, begin, end, token_index, off_mask);
    if (threadIdx.x == 0) token_count[response] = count;
    return count;
}

// Visual rows lie where the mask says, so some of them can be on their way before any list is ready: a row a warp.
template <typename T>
__device__ void prefetch_visual_rows(const FocusInput<T>& input) {
    if (!input.aligned || input.given_prototypes != nullptr) return;
    // A lane looks at a row each, all over the batch: a warp finds a visual one wherever they lie.
    const auto row_of_lane = [](int lane) { return grid_warp() + static_cast<int64_t>(lane) * grid_warps(); };
    const int64_t own = row_of_lane(lane_index());
    const unsigned visual = __ballot_sync(kAllLanes, own < input.layout.num_rows() && input.visual_mask[own]);
    if (visual == 0) return;
    const int64_t row = row_of_lane(__ffs(static_cast<int>(visual)) - 1);
    const int64_t response = input.layout.cu_seqlens == nullptr ? row / input.layout.rows : 0;
    prefetch_row(input.row(response, row), input.dim);
}

template <bool kByOrdinal, typename T, typename OffMask>
__device__ void index_rows(const FocusInput<T>& input, const FocusWorkspace& workspace, float* cos, OffMask off_mask) {
    const bool image = input.given_prototypes == nullptr;
    // Two blocks list a response, but for levels, which one block makes of both lists.
    const int split = image && !input.causal ? 1 : 0;
    for (int64_t item = blockIdx.x; item < input.layout.batch << split; item += gridDim.x) {
        const int64_t response = item >> split;
        const int part = static_cast<int>(item) & split;
        if (image && part == 0) index_image(input, workspace, response);
        if (part == split) {
            index_tokens(input.layout, input.response_mask, workspace.token_index, workspace.token_count, response,
                         off_mask);
        }
        if (!input.causal) continue;
        __syncthreads();
        find_first_level<kByOrdinal>(input.layout, workspace, response, cos);
    }
    prefetch_visual_rows(input);
}

// ---- phase two: sum runs of visual rows -----------------------------------------------------------------------

// A warp sums one run over a vector's width of columns a lane, with kInFlight rows on their way at a time. kUnit: of
// rows as unit vectors.
template <bool kAligned, int kInFlight, bool kUnit, typename T>
__device__ void sum_runs(const FocusInput<T>& input, const FocusWorkspace& workspace, const Level* levels) {
    constexpr int kWidth = kVectorWidth<T>;
    const int strips = ceil_div(input.dim, kWarpColumns<T>);
    auto cursor = ragged_cursor(input.layout.batch, [=, &workspace](int response) {
        return run_count(workspace.visual_rows(levels, response).size());
    });
    for (int item = grid_warp(); cursor.seek(item / strips); item += grid_warps()) {
        const Ordinals listed_rows = workspace.visual_rows(levels, cursor.response());
        const int slot = item / strips, length = run_rows(listed_rows.size());
        const int column = (item % strips) * kWarpColumns<T> + lane_index() * kWidth;
        const int read_column = column < input.dim ? column : 0;  // idle lanes read along
        const int first = listed_rows.begin + (slot - cursor.begin()) * length;
        const int last = first + length < listed_rows.end ? first + length : listed_rows.end;
        const int64_t row_begin = input.layout.row_begin(cursor.response());
        const int32_t* index = workspace.visual_index + row_begin;
        const T* rows = input.row(cursor.response(), row_begin);
        float sums[kWidth] = {};
        for (int strip = first; strip < last; strip += kWarpSize) {
            const int own = strip + lane_index();
            const int32_t listed = index[own < last ? own : last - 1];
            const int rows_left = last - strip < kWarpSize ? last - strip : kWarpSize;
            const float own_factor = kUnit ? input.inverse_norms[row_begin + listed] : 1.0f;
            const auto load = [&](int i) {
                const int64_t relative = __shfl_sync(kAllLanes, listed, i);
                return load_vector<kAligned>(rows + relative * input.strides.row, read_column, input.dim);
            };
            const auto add = [&](uint4 vector, int i) {
                float values[kWidth];
                unpack(vector, input.hidden, values);
                if constexpr (kUnit) {
                    const float factor = __shfl_sync(kAllLanes, own_factor, i);
#pragma unroll
                    for (int j = 0; j < kWidth; ++j) sums[j] = fmaf(values[j], factor, sums[j]);
                } else {
#pragma unroll
                    for (int j = 0; j < kWidth; ++j) sums[j] += values[j];
                }
            };
            // Nothing but loads between loads: a condition there, and the compiler waits for each before the next.
            int i = 0;
            for (; i + kInFlight <= rows_left; i += kInFlight) {
                uint4 vectors[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) vectors[j] = load(i + j);
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) add(vectors[j], i + j);
            }
#pragma unroll 1
            for (; i < rows_left; ++i) add(load(i), i);
        }
        if (column < input.dim) {
            float* slot_sums = workspace.row_sums + static_cast<int64_t>(slot) * input.dim;
            store_floats<kAligned>(slot_sums, column, input.dim, sums);
        }
    }
}

// ---- phase three: average the runs ----------------------------------------------------------------------------

// A warp adds up the runs of a response over 32 columns, in order, and divides. Zeros without visual rows.
__device__ inline void average_runs(const Layout& layout, int dim, const FocusWorkspace& workspace,
                                    const Level* levels) {
    constexpr int kInFlight = 16;
    const int strips = ceil_div(dim, kWarpSize);
    auto cursor = ragged_cursor(layout.batch, [=, &workspace](int response) {
        return run_count(workspace.visual_rows(levels, response).size());
    });
    for (int item = grid_warp(); item < static_cast<int>(layout.batch) * strips; item += grid_warps()) {
        const int response = item / strips, column = (item % strips) * kWarpSize + lane_index();
        const int64_t first_slot = cursor.items_before(response);
        const Ordinals rows = workspace.visual_rows(levels, response);
        const int runs = run_count(rows.size());
        if (column >= dim) continue;
        const float* sums = workspace.row_sums + first_slot * dim + column;
        float total = 0.0f;
        for (int base = 0; base < runs; base += kInFlight) {
            float terms[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                terms[i] = base + i < runs ? sums[static_cast<int64_t>(base + i) * dim] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) total += terms[i];
        }
        const int64_t place = static_cast<int64_t>(response) * dim + column;
        if (levels != nullptr && runs > 0) {
            // In double, for hundreds of levels of a row each add up without a tree.
            const double so_far = rows.begin > 0 ? workspace.totals[place] + total : total;
            workspace.totals[place] = so_far;
            total = static_cast<float>(so_far);
        }
        // Without rows of its own a level has no tokens: it is past the response's last, and nobody reads its mean.
        workspace.prototypes[place] = runs > 0 ? total / static_cast<float>(rows.end) : 0.0f;
    }
}

// ---- phase four: cosines --------------------------------------------------------------------------------------

constexpr int kSharedRows = 8;  // aligned rows that share one pass over the prototype

template <typename T>
__device__ void prefetch_response_rows(const FocusInput<T>& input, const FocusWorkspace& workspace,
                                       const Level* levels) {
    if (!input.aligned) return;
    auto cursor = ragged_cursor(input.layout.batch, [=, &workspace](int response) {
        return ceil_div(workspace.tokens(levels, response).size(), kSharedRows);
    });
    if (!cursor.seek(grid_warp())) return;
    const int64_t response = cursor.response(), begin = input.layout.token_begin(response);
    const int ordinal = workspace.tokens(levels, response).begin + (grid_warp() - cursor.begin()) * kSharedRows;
    const int64_t token = begin + workspace.token_index[begin + ordinal];
    prefetch_row(input.row(response, input.layout.row_of(response, token)), input.dim);
}

// A warp's cosines of rows with one prototype: that of row i to lane i, that of a single row to all lanes. NaN for a
// given prototype of zeros, which means no image. kUnit: products with the prototype in place of cosines, over the norms
// of the rows alone.
template <bool kAligned, int kRows, bool kUnit, typename T>
__device__ __forceinline__ float row_cosines(const FocusInput<T>& input, const T* const (&rows)[kRows],
                                             const float* prototype) {
    constexpr int kWidth = kVectorWidth<T>;
    float dots[kRows] = {}, squares[kRows] = {}, prototype_square = 0.0f;
#pragma unroll 1
    for (int column = lane_index() * kWidth; column < input.dim; column += kWarpColumns<T>) {
        uint4 vectors[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) vectors[i] = load_vector<kAligned>(rows[i], column, input.dim);
        float mean[kWidth];
        load_floats<kAligned>(prototype, column, input.dim, mean);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) prototype_square = fmaf(mean[j], mean[j], prototype_square);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float values[kWidth];
            unpack(vectors[i], input.hidden, values);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                dots[i] = fmaf(values[j], mean[j], dots[i]);
                squares[i] = fmaf(values[j], values[j], squares[i]);
            }
        }
    }
    prototype_square = warp_sum(prototype_square);
    float dot = warp_sum(dots[0]), square = warp_sum(squares[0]);
#pragma unroll
    for (int i = 1; i < kRows; ++i) {
        const float row_dot = warp_sum(dots[i]), row_square = warp_sum(squares[i]);
        dot = lane_index() == i ? row_dot : dot;
        square = lane_index() == i ? row_square : square;
    }
    if (input.given_prototypes != nullptr && prototype_square == 0.0f) {
        // Squares of small numbers are zero, too.
        bool nonzero = false;
        for (int column = lane_index(); column < input.dim; column += kWarpSize) nonzero |= prototype[column] != 0.0f;
        if (__any_sync(kAllLanes, nonzero) == 0) return NAN;
    }
    return cosine(dot, square, kUnit ? 1.0f : sqrtf(prototype_square));
}

// A warp scores kRows consecutive tokens of a response. cos is [tokens]; only tokens under the mask are written, each at
// its place or, by ordinal, those of a response from its first place on.
template <bool kAligned, int kRows, bool kByOrdinal, bool kUnit, typename T>
__device__ void score_rows(const FocusInput<T>& input, const FocusWorkspace& workspace, const Level* levels,
                           float* cos) {
    auto cursor = ragged_cursor(input.layout.batch, [=, &workspace](int response) {
        return ceil_div(workspace.tokens(levels, response).size(), kRows);
    });
    for (int item = grid_warp(); cursor.seek(item); item += grid_warps()) {
        const int response = cursor.response();
        const Ordinals tokens = workspace.tokens(levels, response);
        const int first = tokens.begin + (item - cursor.begin()) * kRows;
        const int rows_left = tokens.end - first < kRows ? tokens.end - first : kRows;
        const int64_t begin = input.layout.token_begin(response);
        // Lane i finds row i; lanes beyond a short item repeat its last row.
        const int listed = first + (lane_index() < rows_left ? lane_index() : rows_left - 1);
        const int own = workspace.token_index[begin + listed];
        const auto row_of_lane = [&](int lane) {
            const int64_t token = begin + __shfl_sync(kAllLanes, own, lane);
            return input.row(response, input.layout.row_of(response, token));
        };
        const float* prototype = nullptr;
        if (input.given_prototypes != nullptr) {
            prototype = input.given_prototype(response, begin + own);
        } else if (workspace.visual_rows(levels, response).end > 0) {
            prototype = workspace.prototypes + static_cast<int64_t>(response) * input.dim;
        }
        float result = NAN;
        if (kRows > 1 && input.index_per_token && !same_in_warp(prototype)) {
            for (int i = 0; i < rows_left; ++i) {
                const float* of_row = from_lane(prototype, i);
                const T* const row[] = {row_of_lane(i)};
                if (of_row == nullptr) continue;
                const float single = row_cosines<kAligned, 1, kUnit>(input, row, of_row);
                result = lane_index() == i ? single : result;
            }
        } else if (prototype != nullptr) {
            const T* rows[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) rows[i] = row_of_lane(i);
            result = row_cosines<kAligned, kRows, kUnit>(input, rows, prototype);
        }
        if (lane_index() < rows_left) cos[begin + (kByOrdinal ? listed : own)] = result;
    }
}

// ---- the phases together --------------------------------------------------------------------------------------

template <bool kUnit, typename T>
__device__ void sum_visual_rows(const FocusInput<T>& input, const FocusWorkspace& workspace, const Level* levels) {
    if (input.aligned) sum_runs<true, 8, kUnit>(input, workspace, levels);
    else sum_runs<false, 1, kUnit>(input, workspace, levels);
}

// From hidden states to cosines of the tokens under the mask, leaving the lists and counts in the workspace. The caller
// puts a grid barrier before it reads them. `off_mask(token)` is called at tokens off the mask.
template <bool kByOrdinal, bool kUnit = false, typename T, typename OffMask>
__device__ void focus_cosines(const FocusInput<T>& input, const FocusWorkspace& workspace, float* cos,
                              OffMask off_mask) {
    const Layout& layout = input.layout;
    index_rows<kByOrdinal>(input, workspace, cos, off_mask);
    grid_sync();
    for (int pass = 0;; ++pass) {
        const Level* levels = input.causal ? workspace.levels + pass % 2 * layout.batch : nullptr;
        Level* next = input.causal ? workspace.levels + (pass + 1) % 2 * layout.batch : nullptr;
        if (input.given_prototypes == nullptr) {
            sum_visual_rows<kUnit>(input, workspace, levels);
            prefetch_response_rows(input, workspace, levels);
            grid_sync();
            average_runs(layout, input.dim, workspace, levels);
            if (input.causal) find_next_levels(layout, workspace, levels, next);
            grid_sync();
        }
        if (input.aligned) score_rows<true, kSharedRows, kByOrdinal, kUnit>(input, workspace, levels, cos);
        else score_rows<false, 1, kByOrdinal, kUnit>(input, workspace, levels, cos);
        // Nothing that a slower block still reads is written before the next barrier.
        if (!input.causal || !any_level(next, layout.batch)) return;
    }
}

// ---- unit vectors ---------------------------------------------------------------------------------------------

template <typename T>
struct InverseNormArguments {
    FocusInput<T> input;   // without response_mask
    float* inverse_norms;  // [rows]; written under the visual mask
};

template <typename T>
int64_t useful_blocks(const InverseNormArguments<T>& arguments) {
    return ceil_div<int64_t>(arguments.input.layout.num_rows(), kThreads);
}

template <bool kAligned, typename T>
__device__ float inverse_norm_of(const T* row, const FocusInput<T>& input) {
    constexpr int kWidth = kVectorWidth<T>;
    float square = 0.0f;
#pragma unroll 4
    for (int column = lane_index() * kWidth; column < input.dim; column += kWarpColumns<T>) {
        float values[kWidth];
        unpack(load_vector<kAligned>(row, column, input.dim), input.hidden, values);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) square = fmaf(values[j], values[j], square);
    }
    return inverse_norm(warp_sum(square));
}

// Lanes of a warp look at a row each, and the warp goes over the visual ones. Of a packed batch all rows are alike, so
// nobody asks whose they are.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    inverse_norm_kernel(const __grid_constant__ InverseNormArguments<T> arguments) {
    const FocusInput<T>& input = arguments.input;
    const int64_t rows = input.layout.num_rows();
    for (int64_t first = static_cast<int64_t>(grid_warp()) * kWarpSize; first < rows;
         first += static_cast<int64_t>(grid_warps()) * kWarpSize) {
        const int64_t own = first + lane_index();
        unsigned visual = __ballot_sync(kAllLanes, own < rows && input.visual_mask[own]);
        while (visual != 0) {
            const int64_t place = first + __ffs(static_cast<int>(visual)) - 1;
            visual &= visual - 1;
            const T* row = input.row(input.layout.cu_seqlens == nullptr ? place / input.layout.rows : 0, place);
            const float result = input.aligned ? inverse_norm_of<true>(row, input) : inverse_norm_of<false>(row, input);
            if (lane_index() == 0) arguments.inverse_norms[place] = result;
        }
    }
}

// ---- kernels --------------------------------------------------------------------------------------------------

template <typename T>
struct VisualPrototypeArguments {
    FocusInput<T> input;       // without response_mask
    FocusWorkspace workspace;  // without lists of tokens; `prototypes` is the result
};

// Every kernel's arguments have `bind`, which takes the arrays of its workspace from an arena (workspace.h), and
// `useful_blocks`, beyond which a grid would only make its barriers slower.
template <typename T>
void bind(VisualPrototypeArguments<T>& arguments, Arena& arena) {
    bind_image(arguments.workspace, arena, arguments.input.layout, arguments.input.dim);
}

template <typename T>
int64_t useful_blocks(const FocusInput<T>& input) {
    const int64_t run_items = max_runs(input.layout) * ceil_div(input.dim, kWarpColumns<T>);
    const int64_t row_items = ceil_div<int64_t>(input.layout.num_tokens(), kSharedRows);
    const int64_t warps = run_items > row_items ? run_items : row_items;
    return 2 * input.layout.batch + ceil_div<int64_t>(warps, kThreads / kWarpSize);
}

template <typename T>
int64_t useful_blocks(const VisualPrototypeArguments<T>& arguments) {
    return useful_blocks(arguments.input);
}

template <bool kUnit, typename T>
__device__ void average_visual_rows(const FocusInput<T>& input, const FocusWorkspace& workspace) {
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        index_image(input, workspace, response);
    }
    prefetch_visual_rows(input);
    grid_sync();
    sum_visual_rows<kUnit>(input, workspace, nullptr);
    grid_sync();
    average_runs(input.layout, input.dim, workspace, nullptr);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    visual_prototype_kernel(const __grid_constant__ VisualPrototypeArguments<T> arguments) {
    average_visual_rows<false>(arguments.input, arguments.workspace);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    unit_prototype_kernel(const __grid_constant__ VisualPrototypeArguments<T> arguments) {
    average_visual_rows<true>(arguments.input, arguments.workspace);
}

template <typename T>
struct VisualFocusArguments {
    FocusInput<T> input;
    FocusWorkspace workspace;
    float* cos;  // [tokens]
};

template <typename T>
void bind(VisualFocusArguments<T>& arguments, Arena& arena) {
    bind_focus(arguments.workspace, arena, arguments.input);
}

template <typename T>
int64_t useful_blocks(const VisualFocusArguments<T>& arguments) {
    return useful_blocks(arguments.input);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    visual_focus_kernel(const __grid_constant__ VisualFocusArguments<T> arguments) {
    float* cos = arguments.cos;
    focus_cosines<false>(arguments.input, arguments.workspace, cos, [=](int64_t token) { cos[token] = 0.0f; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    unit_focus_kernel(const __grid_constant__ VisualFocusArguments<T> arguments) {
    float* cos = arguments.cos;
    focus_cosines<false, true>(arguments.input, arguments.workspace, cos, [=](int64_t token) { cos[token] = 0.0f; });
}

}  // namespace cuda
}  // namespace vgpo
