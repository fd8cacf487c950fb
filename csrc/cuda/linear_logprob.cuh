// Epilogues of an LM head's matrix products: statistics of a chunk's logits, and their gradient in place.
//
// A block goes over a row of the chunk once: 4 bytes read a logit for the statistics, and for the gradient as many
// written in fp32, half in 16 bits. Nothing else counts, so both run at the memory's speed: for 4,096 rows of 152,064
// logits 2.5 GB and 3.7 GB in all, where the product of that shape at D = 3584 takes 4.5 TFLOP.
#pragma once

#include "vector.cuh"

namespace vgpo {
namespace cuda {

constexpr int kHeadThreads = 256;
constexpr int kHeadVectors = 4;  // of four logits, on their way at a time
constexpr int kHeadColumns = kHeadThreads * kHeadVectors * 4;  // of a pass of the block

// Behind this, exp() is zero. A finite bound keeps zero times the distance from being NaN.
constexpr float kFarthestLogit = -128.0f;

// The rows of a chunk: fp32 products, hidden @ weight.T, and what makes logits of them.
struct HeadRows {
    float* products;  // [N, V]
    int64_t stride;
    const float* bias;       // [V], or null
    const int64_t* targets;  // [N], ids in the whole vocabulary
    int64_t first;           // id of the first column
    int columns;             // V
    float factor;            // one over the temperature

    __device__ float* row(int64_t index) const { return products + index * stride; }
    __device__ float logit(const float* row, int column) const {
        return (row[column] + (bias == nullptr ? 0.0f : bias[column])) * factor;
    }
    // The column of a row's target, or -1.
    __device__ int target(int64_t row) const { return static_cast<int>(column_of(targets[row], first, columns)); }
};

// Elements by which a row lies behind a 16-byte boundary: its vectors begin so many elements before it.
__device__ inline int misalignment(const float* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
}

// Columns [column, column + 4) of a row as logits, -infinity outside it; `column` lies on a 16-byte boundary.
__device__ __forceinline__ float4 load_logits(const HeadRows& rows, const float* row, int column) {
    float4 four;
    if (column >= 0 && column + 4 <= rows.columns) {
        four = __ldcs(reinterpret_cast<const float4*>(row + column));
    } else {
        const auto one = [&](int i) { return i >= 0 && i < rows.columns ? row[i] : -INFINITY; };
        four = make_float4(one(column), one(column + 1), one(column + 2), one(column + 3));
    }
    if (rows.bias != nullptr) {
        const auto offset = [&](int i) { return i >= 0 && i < rows.columns ? rows.bias[i] : 0.0f; };
        four.x += offset(column);
        four.y += offset(column + 1);
        four.z += offset(column + 2);
        four.w += offset(column + 3);
    }
    return make_float4(four.x * rows.factor, four.y * rows.factor, four.z * rows.factor, four.w * rows.factor);
}

__device__ __forceinline__ void unpack_four(float4 four, float (&values)[4]) {
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

// ---- statistics ------------------------------------------------------------------------------------------------

// The largest logit m, and the sums of e and of e (z - m) with e = exp(z - m).
struct LogitStatistics {
    float maximum;
    float total;
    float weighted;

    __device__ static LogitStatistics identity() { return {-INFINITY, 0.0f, 0.0f}; }
    // What the smaller maximum's sums are relative to moves to the larger one. Of equal ones the distance is zero, and
    // so the order does not matter to the bit.
    __device__ void merge(const LogitStatistics& other) {
        const bool rises = other.maximum > maximum;
        const LogitStatistics large = rises ? other : *this, small = rises ? *this : other;
        // Without an entry so far there is nothing to rescale, and its maximum is infinitely far away.
        const float drop = small.total > 0.0f ? small.maximum - large.maximum : 0.0f;
        const float scale = expf(drop);
        maximum = large.maximum;
        total = large.total + small.total * scale;
        weighted = large.weighted + (small.weighted + small.total * drop) * scale;
    }
};

struct HeadStatisticsArguments {
    HeadRows rows;
    float* statistics;  // [4, N], updated: maximum, total, weighted, target
    int64_t statistics_stride;
};

template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads)
    head_statistics_kernel(const __grid_constant__ HeadStatisticsArguments arguments) {
    const HeadRows& rows = arguments.rows;
    const int64_t index = blockIdx.x;
    const float* row = rows.row(index);
    const int before = misalignment(row), step = 4 * static_cast<int>(blockDim.x);
    LogitStatistics own = LogitStatistics::identity();
    for (int64_t begin = -before; begin < rows.columns; begin += kHeadVectors * step) {
        float logits[kHeadVectors][4];
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
            const int64_t column = begin + i * step + 4 * static_cast<int>(threadIdx.x);
            unpack_four(column < rows.columns ? load_logits(rows, row, static_cast<int>(column))
                                              : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY),
                        logits[i]);
        }
        LogitStatistics part = LogitStatistics::identity();
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) part.maximum = fmaxf(part.maximum, logits[i][j]);
        }
        // A bias may forbid every entry: there is nothing to measure distances from.
        const float origin = part.maximum == -INFINITY ? 0.0f : part.maximum;
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float distance = logits[i][j] - origin, share = expf(distance);
                part.total += share;
                part.weighted = fmaf(share, fmaxf(distance, kFarthestLogit), part.weighted);
            }
        }
        own.merge(part);
    }
    own = block_reduce(own);
    if (threadIdx.x != 0) return;
    float* running = arguments.statistics + index;
    const int64_t stride = arguments.statistics_stride;
    LogitStatistics all = {running[0], running[stride], running[2 * stride]};
    all.merge(own);
    running[0] = all.maximum;
    running[stride] = all.total;
    running[2 * stride] = all.weighted;
    const int target = rows.target(index);
    if (target >= 0) running[3 * stride] = rows.logit(row, target);
}

// ---- gradient --------------------------------------------------------------------------------------------------

struct HeadGradientArguments {
    HeadRows rows;
    const float* coefficients;  // [5, N]: maximum, log_sum, scale, slope, at_target
    int64_t coefficients_stride;
};

__device__ __forceinline__ void store_gradient(float* to, const float (&values)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
}
template <typename T>
__device__ __forceinline__ void store_gradient(T* to, const float (&values)[4]) {
    const uint2 words = {pack(values[0], values[1], to), pack(values[2], values[3], to)};
    *reinterpret_cast<uint2*>(to) = words;
}
// Turns a row of products into its gradient, of type T, from the row's beginning on.
template <typename T>
__global__ void __launch_bounds__(kHeadThreads)
    head_gradient_kernel(const __grid_constant__ HeadGradientArguments arguments) {
    const HeadRows& rows = arguments.rows;
    const int64_t index = blockIdx.x, stride = arguments.coefficients_stride;
    const float* row = rows.row(index);
    T* gradient = reinterpret_cast<T*>(rows.row(index));
    const float* coefficients = arguments.coefficients + index;
    const float maximum = coefficients[0], log_sum = coefficients[stride], level = coefficients[2 * stride];
    const float slope = coefficients[3 * stride], at_target = coefficients[4 * stride];
    const int target = rows.target(index), before = misalignment(row), step = 4 * static_cast<int>(blockDim.x);
    for (int64_t begin = -before; begin < rows.columns; begin += kHeadVectors * step) {
        float values[kHeadVectors][4];
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
            const int64_t column = begin + i * step + 4 * static_cast<int>(threadIdx.x);
            if (column < rows.columns) unpack_four(load_logits(rows, row, static_cast<int>(column)), values[i]);
        }
        // Narrow numbers take the place of wide ones that other threads have still to read, but only of this pass:
        // those behind it are never reached.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
            const int64_t column = begin + i * step + 4 * static_cast<int>(threadIdx.x);
            if (column >= rows.columns) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float log_probability = values[i][j] - maximum - log_sum;
                values[i][j] = expf(log_probability) * fmaf(slope, fmaxf(log_probability, kFarthestLogit), level);
                values[i][j] += column + j == target ? at_target : 0.0f;
            }
            // Narrow vectors of a row that lies askew are askew as well.
            if (column >= 0 && column + 4 <= rows.columns && (before == 0 || sizeof(T) == sizeof(float))) {
                store_gradient(gradient + column, values[i]);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (column + j >= 0 && column + j < rows.columns) store_float(gradient + column + j, values[i][j]);
                }
            }
        }
    }
}

}  // namespace cuda
}  // namespace vgpo
