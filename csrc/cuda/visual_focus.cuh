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
    const int64_t* prototype_index;  // [B], or null: response b has row b
    int64_t num_given;               // P

    __device__ const T* row(int64_t response, int64_t row_index) const {
        return hidden + strides.offset(layout, response, row_index);
    }

    // The row of a response among the given prototypes; -1 without an image.
    __device__ int64_t given_row(int64_t response) const {
        const int64_t row = prototype_index == nullptr ? response : prototype_index[response];
        return row < num_given ? row : num_given - 1;
    }
};

struct FocusWorkspace {
    int32_t* visual_index = nullptr;  // [rows] rows under the visual mask, relative to their response's first
    int32_t* visual_count = nullptr;  // [B] their number; where prototypes are given, whether there is an image
    int32_t* token_index = nullptr;   // [tokens] tokens under the response mask, relative to their response's first
    int32_t* token_count = nullptr;   // [B]
    float* row_sums = nullptr;        // [slots, D] sums of consecutive visual rows
    float* prototypes = nullptr;      // [B, D]
};

// ---- the shape of the first reduction -------------------------------------------------------------------------
//
// The visual rows of a response are summed in runs of consecutive ordinals, then the runs are summed in order. The run
// length depends on the number of rows alone, so the bits do not depend on batch, layout or device.

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

// Arrays that the visual rows need; with given prototypes only whether there is an image.
inline void bind_image(FocusWorkspace& workspace, Arena& arena, const Layout& layout, int64_t dim, bool given) {
    workspace.visual_count = arena.take<int32_t>("visual_count", layout.batch);
    if (given) return;
    workspace.visual_index = arena.take<int32_t>("visual_index", layout.num_rows());
    workspace.row_sums = arena.take<float>("row_sums", max_runs(layout) * dim);
}

inline void bind_tokens(FocusWorkspace& workspace, Arena& arena, const Layout& layout) {
    workspace.token_count = arena.take<int32_t>("token_count", layout.batch);
    workspace.token_index = arena.take<int32_t>("token_index", layout.num_tokens());
}

// ---- phase one: list the rows ---------------------------------------------------------------------------------

// A block lists the visual rows of a response, or looks whether its given prototype is one (zeros mean no image).
template <typename T>
__device__ void index_image(const FocusInput<T>& input, const FocusWorkspace& workspace, int64_t response) {
    int count;
    if (input.given_prototypes == nullptr) {
        count = compact_mask(input.visual_mask, input.layout.row_begin(response), input.layout.row_end(response),
                             workspace.visual_index, [](int64_t) {});
    } else {
        const int64_t row = input.given_row(response);
        bool nonzero = false;
        for (int column = threadIdx.x; row >= 0 && column < input.dim; column += blockDim.x) {
            nonzero |= input.given_prototypes[row * input.dim + column] != 0.0f;
        }
        count = __syncthreads_or(nonzero);
    }
    if (threadIdx.x == 0) workspace.visual_count[response] = count;
}

// A block lists the scored tokens of a response.
template <typename OffMask>
__device__ int index_tokens(const Layout& layout, const bool* response_mask, int32_t* token_index,
                            int32_t* token_count, int64_t response, OffMask off_mask) {
    const int count = compact_mask(response_mask, layout.token_begin(response), layout.token_end(response),
                                   token_index, off_mask);
    if (threadIdx.x == 0) token_count[response] = count;
    return count;
}

// Visual rows lie where the mask says, so the first of them can be on their way before any list is ready.
template <typename T>
__device__ void prefetch_visual_rows(const FocusInput<T>& input) {
    const int64_t row = grid_warp();
    if (!input.aligned || input.given_prototypes != nullptr || row >= input.layout.num_rows() || !input.visual_mask[row]) return;
    const int64_t response = input.layout.cu_seqlens == nullptr ? row / input.layout.rows : 0;
    prefetch_row(input.row(response, row), input.dim);
}

template <typename T, typename OffMask>
__device__ void index_rows(const FocusInput<T>& input, const FocusWorkspace& workspace, OffMask off_mask) {
    for (int64_t item = blockIdx.x; item < 2 * input.layout.batch; item += gridDim.x) {
        if (item % 2 == 0) {
            index_image(input, workspace, item / 2);
        } else {
            index_tokens(input.layout, input.response_mask, workspace.token_index, workspace.token_count, item / 2,
                         off_mask);
        }
    }
    prefetch_visual_rows(input);
}

// ---- phase two: sum runs of visual rows -----------------------------------------------------------------------

// A warp sums one run over a vector's width of columns a lane, with kInFlight rows on their way at a time.
template <bool kAligned, int kInFlight, typename T>
__device__ void sum_runs(const FocusInput<T>& input, const FocusWorkspace& workspace) {
    constexpr int kWidth = kVectorWidth<T>;
    const int strips = ceil_div(input.dim, kWarpColumns<T>);
    const int32_t* counts = workspace.visual_count;
    auto cursor = ragged_cursor(input.layout.batch, [=](int response) { return run_count(counts[response]); });
    for (int item = grid_warp(); cursor.seek(item / strips); item += grid_warps()) {
        const int slot = item / strips, count = counts[cursor.response()], length = run_rows(count);
        const int column = (item % strips) * kWarpColumns<T> + lane_index() * kWidth;
        const int read_column = column < input.dim ? column : 0;  // idle lanes read along
        const int first = (slot - cursor.begin()) * length;
        const int last = first + length < count ? first + length : count;
        const int64_t row_begin = input.layout.row_begin(cursor.response());
        const int32_t* index = workspace.visual_index + row_begin;
        const T* rows = input.row(cursor.response(), row_begin);
        float sums[kWidth] = {};
        for (int strip = first; strip < last; strip += kWarpSize) {
            const int own = strip + lane_index();
            const int32_t listed = index[own < last ? own : last - 1];
            const int rows_left = last - strip < kWarpSize ? last - strip : kWarpSize;
            const auto load = [&](int i) {
                const int64_t relative = __shfl_sync(kAllLanes, listed, i);
                return load_vector<kAligned>(rows + relative * input.strides.row, read_column, input.dim);
            };
            const auto add = [&](uint4 vector) {
                float values[kWidth];
                unpack(vector, input.hidden, values);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sums[j] += values[j];
            };
            // Nothing but loads between loads: a condition there, and the compiler waits for each before the next.
            int i = 0;
            for (; i + kInFlight <= rows_left; i += kInFlight) {
                uint4 vectors[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) vectors[j] = load(i + j);
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) add(vectors[j]);
            }
#pragma unroll 1
            for (; i < rows_left; ++i) add(load(i));
        }
        if (column < input.dim) {
            float* slot_sums = workspace.row_sums + static_cast<int64_t>(slot) * input.dim;
            store_floats<kAligned>(slot_sums, column, input.dim, sums);
        }
    }
}

// ---- phase three: average the runs ----------------------------------------------------------------------------

// A warp adds up the runs of a response over 32 columns, in order, and divides. Zeros without visual rows.
__device__ inline void average_runs(const Layout& layout, int dim, const FocusWorkspace& workspace) {
    constexpr int kInFlight = 16;
    const int strips = ceil_div(dim, kWarpSize);
    const int32_t* counts = workspace.visual_count;
    auto cursor = ragged_cursor(layout.batch, [=](int response) { return run_count(counts[response]); });
    for (int item = grid_warp(); item < static_cast<int>(layout.batch) * strips; item += grid_warps()) {
        const int response = item / strips, column = (item % strips) * kWarpSize + lane_index();
        const int64_t first_slot = cursor.items_before(response);
        const int count = counts[response], runs = run_count(count);
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
        float* prototype = workspace.prototypes + static_cast<int64_t>(response) * dim;
        prototype[column] = count > 0 ? total / static_cast<float>(count) : 0.0f;
    }
}

// ---- phase four: cosines --------------------------------------------------------------------------------------

constexpr int kSharedRows = 8;  // aligned rows that share one pass over the prototype

template <typename T>
__device__ void prefetch_response_rows(const FocusInput<T>& input, const FocusWorkspace& workspace) {
    if (!input.aligned) return;
    const int32_t* counts = workspace.token_count;
    auto cursor =
        ragged_cursor(input.layout.batch, [=](int response) { return ceil_div(counts[response], kSharedRows); });
    if (!cursor.seek(grid_warp())) return;
    const int64_t begin = input.layout.token_begin(cursor.response());
    const int64_t token = begin + workspace.token_index[begin + (grid_warp() - cursor.begin()) * kSharedRows];
    prefetch_row(input.row(cursor.response(), input.layout.row_of(cursor.response(), token)), input.dim);
}

// A warp scores kRows consecutive tokens of a response. cos is [tokens]; only tokens under the mask are written.
template <bool kAligned, int kRows, typename T>
__device__ void score_rows(const FocusInput<T>& input, const FocusWorkspace& workspace, float* cos) {
    constexpr int kWidth = kVectorWidth<T>;
    const int32_t* counts = workspace.token_count;
    auto cursor = ragged_cursor(input.layout.batch, [=](int response) { return ceil_div(counts[response], kRows); });
    for (int item = grid_warp(); cursor.seek(item); item += grid_warps()) {
        const int response = cursor.response(), first = (item - cursor.begin()) * kRows;
        const int rows_left = counts[response] - first < kRows ? counts[response] - first : kRows;
        const int64_t begin = input.layout.token_begin(response);
        // Lane i finds row i; lanes beyond a short item repeat its last row.
        const int listed = first + (lane_index() < rows_left ? lane_index() : rows_left - 1);
        const int own = workspace.token_index[begin + listed];
        if (workspace.visual_count[response] == 0) {
            if (lane_index() < rows_left) cos[begin + own] = 0.0f;
            continue;
        }
        const float* prototype = input.given_prototypes == nullptr
                                     ? workspace.prototypes + static_cast<int64_t>(response) * input.dim
                                     : input.given_prototypes + input.given_row(response) * input.dim;
        const T* rows[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t token = begin + __shfl_sync(kAllLanes, own, i);
            rows[i] = input.row(response, input.layout.row_of(response, token));
        }
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
        const float prototype_norm = sqrtf(warp_sum(prototype_square));
        float dot = 0.0f, square = 0.0f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const float row_dot = warp_sum(dots[i]), row_square = warp_sum(squares[i]);
            dot = lane_index() == i ? row_dot : dot;
            square = lane_index() == i ? row_square : square;
        }
        if (lane_index() < rows_left) cos[begin + own] = cosine(dot, square, prototype_norm);
    }
}

// ---- the phases together --------------------------------------------------------------------------------------

template <typename T>
__device__ void sum_visual_rows(const FocusInput<T>& input, const FocusWorkspace& workspace) {
    if (input.aligned) sum_runs<true, 8>(input, workspace);
    else sum_runs<false, 1>(input, workspace);
}

// From hidden states to cosines of the tokens under the mask, leaving the lists and counts in the workspace. The caller
// puts a grid barrier before it reads them. `off_mask(token)` is called at tokens off the mask.
template <typename T, typename OffMask>
__device__ void focus_cosines(const FocusInput<T>& input, const FocusWorkspace& workspace, float* cos,
                              OffMask off_mask) {
    index_rows(input, workspace, off_mask);
    grid_sync();
    if (input.given_prototypes == nullptr) {
        sum_visual_rows(input, workspace);
        prefetch_response_rows(input, workspace);
        grid_sync();
        average_runs(input.layout, input.dim, workspace);
        grid_sync();
    }
    if (input.aligned) score_rows<true, kSharedRows>(input, workspace, cos);
    else score_rows<false, 1>(input, workspace, cos);
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
    bind_image(arguments.workspace, arena, arguments.input.layout, arguments.input.dim, false);
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

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    visual_prototype_kernel(const __grid_constant__ VisualPrototypeArguments<T> arguments) {
    const FocusInput<T>& input = arguments.input;
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        index_image(input, arguments.workspace, response);
    }
    prefetch_visual_rows(input);
    grid_sync();
    sum_visual_rows(input, arguments.workspace);
    grid_sync();
    average_runs(input.layout, input.dim, arguments.workspace);
}

template <typename T>
struct VisualFocusArguments {
    FocusInput<T> input;
    FocusWorkspace workspace;
    float* cos;  // [tokens]
};

template <typename T>
void bind(VisualFocusArguments<T>& arguments, Arena& arena) {
    const FocusInput<T>& input = arguments.input;
    const bool given = input.given_prototypes != nullptr;
    bind_image(arguments.workspace, arena, input.layout, input.dim, given);
    bind_tokens(arguments.workspace, arena, input.layout);
    if (!given) arguments.workspace.prototypes = arena.take<float>("prototypes", input.layout.batch * input.dim);
}

template <typename T>
int64_t useful_blocks(const VisualFocusArguments<T>& arguments) {
    return useful_blocks(arguments.input);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    visual_focus_kernel(const __grid_constant__ VisualFocusArguments<T> arguments) {
    float* cos = arguments.cos;
    focus_cosines(arguments.input, arguments.workspace, cos, [=](int64_t token) { cos[token] = 0.0f; });
}

}  // namespace cuda
}  // namespace vgpo
