// The mean of the visual rows before each position of a response (Eq. 3, of images that arrive late).
//
// A warp owns columns of a response and walks over its rows in order, with sums in fp64: the order is fixed, and sums
// of any length keep fp32's precision.
//
// Memory traffic: each visual row is read once, and a row of fp32 is written for every position, 4 D bytes: at D = 3584
// and 8 responses of 3,072 positions 352 MB, 82 us at a copy bandwidth of 4.3 TB/s. A walk has six loads on their way,
// and there are only as many walks as strips of columns, so some 150 us are expected, not measured.
#pragma once

#include "visual_focus.cuh"

namespace vgpo {
namespace cuda {

template <typename T>
struct CausalPrototypeArguments {
    FocusInput<T> input;  // without response_mask
    float* prototypes;    // [rows, D]
};

template <typename T>
int64_t useful_blocks(const CausalPrototypeArguments<T>& arguments) {
    const FocusInput<T>& input = arguments.input;
    return ceil_div<int64_t>(input.layout.batch * ceil_div(input.dim, kWarpColumns<T>), kThreads / kWarpSize);
}

// A warp walks over the rows of a response, over a vector's width of columns a lane: the mean so far, then the row.
template <bool kAligned, bool kUnit, typename T>
__device__ void average_rows_before(const FocusInput<T>& input, float* prototypes) {
    constexpr int kWidth = kVectorWidth<T>, kInFlight = 6;  // as many as registers allow
    const int strips = ceil_div(input.dim, kWarpColumns<T>);
    for (int64_t item = grid_warp(); item < input.layout.batch * strips; item += grid_warps()) {
        const int64_t response = item / strips, end = input.layout.row_end(response);
        const int column = static_cast<int>(item % strips) * kWarpColumns<T> + lane_index() * kWidth;
        const int read_column = column < input.dim ? column : 0;  // idle lanes read along
        double totals[kWidth] = {};
        float means[kWidth] = {};
        int count = 0;
        for (int64_t first = input.layout.row_begin(response); first < end; first += kInFlight) {
            const bool own = lane_index() < kInFlight && first + lane_index() < end &&
                             input.visual_mask[first + lane_index()];
            const unsigned visual = __ballot_sync(kAllLanes, own);
            const float own_factor = kUnit && own ? input.inverse_norms[first + lane_index()] : 1.0f;
            uint4 vectors[kInFlight] = {};
            if (visual != 0) {
                // Rows off the mask are not read: one of the others in their place.
                const int other = __ffs(static_cast<int>(visual)) - 1;
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const T* row = input.row(response, first + ((visual >> i & 1) != 0 ? i : other));
                    vectors[i] = load_vector<kAligned>(row, read_column, input.dim);
                }
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (column < input.dim && first + i < end) {
                    store_floats<kAligned>(prototypes + (first + i) * input.dim, column, input.dim, means);
                }
                const float factor = kUnit ? __shfl_sync(kAllLanes, own_factor, i) : 1.0f;
                if ((visual >> i & 1) == 0) continue;
                ++count;
                float values[kWidth];
                unpack(vectors[i], input.hidden, values);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    totals[j] += kUnit ? values[j] * factor : values[j];
                    means[j] = static_cast<float>(totals[j]) / static_cast<float>(count);
                }
            }
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    causal_prototype_kernel(const __grid_constant__ CausalPrototypeArguments<T> arguments) {
    if (arguments.input.aligned) average_rows_before<true, false>(arguments.input, arguments.prototypes);
    else average_rows_before<false, false>(arguments.input, arguments.prototypes);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    causal_unit_prototype_kernel(const __grid_constant__ CausalPrototypeArguments<T> arguments) {
    if (arguments.input.aligned) average_rows_before<true, true>(arguments.input, arguments.prototypes);
    else average_rows_before<false, true>(arguments.input, arguments.prototypes);
}

}  // namespace cuda
}  // namespace vgpo
