// Epilogues of an LM head's matrix products: statistics of a chunk's logits, and their gradient in place.
//
// A block goes over a row of the chunk once: 4 bytes read a logit for the statistics, and for the gradient as many
// written in fp32, half in 16 bits. Nothing else counts, so both run at the memory's speed: for 4,096 rows of 152,064
// logits 2.5 GB and 3.7 GB in all, where the product of that shape at D = 3584 takes 4.5 TFLOP.
#pragma once

#include "../logit_map.h"
#include "vector.cuh"

namespace vgpo {
namespace cuda {

constexpr int kHeadThreads = 256;
constexpr int kHeadVectors = 4;  // of four logits, on their way at a time

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
    LogitMaps maps;

    __device__ float* row(int64_t index) const { return products + index * stride; }
    __device__ float offset_product(const float* row, int column) const {
        return row[column] + (bias == nullptr ? 0.0f : bias[column]);
    }
    // The column of a row's target, or -1.
    __device__ int target(int64_t row) const { return static_cast<int>(column_of(targets[row], first, columns)); }
};

// Elements by which a row lies behind a 16-byte boundary: its vectors begin so many elements before it.
__device__ inline int misalignment(const float* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
}

// Products [column, column + 4) of a row, -infinity outside it; `aligned`: `column` lies on a 16-byte boundary.
__device__ __forceinline__ float4 load_guarded(const HeadRows& rows, const float* row, int64_t column, bool aligned) {
    if (aligned && column >= 0 && column + 4 <= rows.columns) {
        return __ldcs(reinterpret_cast<const float4*>(row + column));
    }
    const auto one = [&](int64_t i) { return i >= 0 && i < rows.columns ? row[i] : -INFINITY; };
    return make_float4(one(column), one(column + 1), one(column + 2), one(column + 3));
}

// A pass of the block over a row: each thread has kHeadVectors vectors, `step` columns apart.
struct HeadPass {
    int64_t own;  // first column of this thread's first vector
    int step;
    bool whole;  // every vector of the block lies in the row

    __device__ HeadPass(int64_t begin, int columns)
        : own(begin + 4 * static_cast<int>(threadIdx.x)),
          step(4 * static_cast<int>(blockDim.x)),
          whole(begin >= 0 && begin + kHeadVectors * step <= columns) {}

    __device__ int64_t column(int vector) const { return own + vector * step; }
    __device__ bool inside(int vector, int element, int columns) const {
        const int64_t place = column(vector) + element;
        return whole || (place >= 0 && place < columns);
    }

    // Products; -infinity outside the row. Only of a pass that is not whole may vectors not be aligned.
    template <bool kWhole>
    __device__ __forceinline__ void fetch(const HeadRows& rows, const float* row, float4 (&fours)[kHeadVectors],
                                          bool aligned = true) const {
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
            if constexpr (kWhole) fours[i] = __ldcs(reinterpret_cast<const float4*>(row + column(i)));
            else fours[i] = load_guarded(rows, row, column(i), aligned);
        }
    }

    // The same by element, plus bias.
    __device__ __forceinline__ void unpack(const HeadRows& rows, const float4 (&fours)[kHeadVectors],
                                           float (&products)[kHeadVectors][4]) const {
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
            products[i][0] = fours[i].x;
            products[i][1] = fours[i].y;
            products[i][2] = fours[i].z;
            products[i][3] = fours[i].w;
        }
        if (rows.bias != nullptr) {
            each([&](int i, int j) {
                const int64_t place = column(i) + j;
                if (place >= 0 && place < rows.columns) products[i][j] += rows.bias[place];
            });
        }
    }

    // In a whole pass no branch stands between the loads: all are on their way before the first one is waited for.
    __device__ __forceinline__ void load(const HeadRows& rows, const float* row,
                                         float (&products)[kHeadVectors][4]) const {
        float4 fours[kHeadVectors];
        if (whole) fetch<true>(rows, row, fours);
        else fetch<false>(rows, row, fours);
        unpack(rows, fours, products);
    }

    template <typename Body>
    __device__ __forceinline__ static void each(Body body) {
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) body(i, j);
        }
    }
};

// Turns products of a pass into logits, and what lies outside the row into -infinity.
template <bool kCapped>
__device__ __forceinline__ void to_logits(const HeadPass& pass, int columns, const LogitMap& map,
                                          float (&values)[kHeadVectors][4]) {
    HeadPass::each([&](int i, int j) {
        if constexpr (kCapped) {
            const float logit = hyperbolic_tangent(values[i][j] * map.squeeze) * map.factor;
            values[i][j] = pass.inside(i, j, columns) ? logit : -INFINITY;
        } else {
            values[i][j] *= map.factor;
        }
    });
}

// ---- statistics ------------------------------------------------------------------------------------------------

// The largest logit m, and the sums of e and of e (z - m) with e = exp(z - m).
struct LogitStatistics {
    float maximum;
    float total;
    float weighted;

    __device__ static LogitStatistics identity() { return {-INFINITY, 0.0f, 0.0f}; }
    __device__ static LogitStatistics load(const float* running, int64_t stride) {
        return {running[0], running[stride], running[2 * stride]};
    }
    __device__ void store(float* running, int64_t stride) const {
        running[0] = maximum;
        running[stride] = total;
        running[2 * stride] = weighted;
    }
    __device__ float& largest() { return maximum; }
    __device__ void add_share(float share, float distance) {
        total += share;
        weighted = fmaf(share, fmaxf(distance, kFarthestLogit), weighted);
    }
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

// The same, and the sum of e^2.
struct SquaredLogitStatistics {
    LogitStatistics plain;
    float squares;

    __device__ static SquaredLogitStatistics identity() { return {LogitStatistics::identity(), 0.0f}; }
    __device__ static SquaredLogitStatistics load(const float* running, int64_t stride) {
        return {LogitStatistics::load(running, stride), running[kSquaresRow * stride]};
    }
    __device__ void store(float* running, int64_t stride) const {
        plain.store(running, stride);
        running[kSquaresRow * stride] = squares;
    }
    __device__ float& largest() { return plain.maximum; }
    __device__ void add_share(float share, float distance) {
        plain.add_share(share, distance);
        squares = fmaf(share, share, squares);
    }
    __device__ void merge(const SquaredLogitStatistics& other) {
        const bool rises = other.plain.maximum > plain.maximum;
        const SquaredLogitStatistics large = rises ? other : *this, small = rises ? *this : other;
        const float drop = small.plain.total > 0.0f ? small.plain.maximum - large.plain.maximum : 0.0f;
        squares = large.squares + small.squares * expf(2.0f * drop);
        plain.merge(other.plain);
    }
};

struct HeadStatisticsArguments {
    HeadRows rows;
    float* statistics;  // [4, N], updated: maximum, total, weighted, target; [5, N]: squares, too
    int64_t statistics_stride;
};

template <int kBlockThreads, bool kCapped, bool kSquares>
__global__ void __launch_bounds__(kBlockThreads)
    head_statistics_kernel(const __grid_constant__ HeadStatisticsArguments arguments) {
    const HeadRows& rows = arguments.rows;
    const int64_t index = blockIdx.x;
    const LogitMap map = rows.maps.of_row(index);
    const float* row = rows.row(index);
    using Statistics = std::conditional_t<kSquares, SquaredLogitStatistics, LogitStatistics>;
    Statistics own = Statistics::identity();
    for (int64_t begin = -misalignment(row); begin < rows.columns; begin += kHeadVectors * 4 * blockDim.x) {
        float logits[kHeadVectors][4];
        const HeadPass pass(begin, rows.columns);
        pass.load(rows, row, logits);
        to_logits<kCapped>(pass, rows.columns, map, logits);
        Statistics part = Statistics::identity();
        float& largest = part.largest();
        HeadPass::each([&](int i, int j) { largest = fmaxf(largest, logits[i][j]); });
        // A bias may forbid every entry: there is nothing to measure distances from.
        const float origin = largest == -INFINITY ? 0.0f : largest;
        HeadPass::each([&](int i, int j) {
            const float distance = logits[i][j] - origin;
            part.add_share(expf(distance), distance);
        });
        own.merge(part);
    }
    own = block_reduce(own);
    if (threadIdx.x != 0) return;
    float* running = arguments.statistics + index;
    const int64_t stride = arguments.statistics_stride;
    Statistics all = Statistics::load(running, stride);
    all.merge(own);
    all.store(running, stride);
    const int target = rows.target(index);
    if (target < 0) return;
    const float product = rows.offset_product(row, target);
    running[3 * stride] = (kCapped ? hyperbolic_tangent(product * map.squeeze) : product) * map.factor;
}

// ---- gradient --------------------------------------------------------------------------------------------------

struct HeadGradientArguments {
    HeadRows rows;
    const float* coefficients;  // [5, N]: maximum, log_sum, scale, slope, at_target
    int64_t coefficients_stride;
};

// A vector store by name: the compiler takes an assignment apart into its elements.
__device__ __forceinline__ void store_gradient(float* to, const float (&values)[4]) {
    __stcg(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
}
template <typename T>
__device__ __forceinline__ void store_gradient(T* to, const float (&values)[4]) {
    const uint2 words = {pack(values[0], values[1], to), pack(values[2], values[3], to)};
    __stcg(reinterpret_cast<uint2*>(to), words);
}

// Stores a pass over a row's gradient; in vectors where those of its elements are aligned.
template <typename T>
__device__ __forceinline__ void store_pass(const HeadPass& pass, T* gradient, int columns, bool vectors,
                                           const float (&values)[kHeadVectors][4]) {
    if (pass.whole && vectors) {
#pragma unroll
        for (int i = 0; i < kHeadVectors; ++i) store_gradient(gradient + pass.column(i), values[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kHeadVectors; ++i) {
        const int64_t column = pass.column(i);
        if (vectors && column >= 0 && column + 4 <= columns) {
            store_gradient(gradient + column, values[i]);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (column + j >= 0 && column + j < columns) store_float(gradient + column + j, values[i][j]);
        }
    }
}

// Turns a row of products into its gradient, of type T, from the row's beginning on.
template <typename T, bool kCapped>
__global__ void __launch_bounds__(kHeadThreads)
    head_gradient_kernel(const __grid_constant__ HeadGradientArguments arguments) {
    const HeadRows& rows = arguments.rows;
    const int64_t index = blockIdx.x, stride = arguments.coefficients_stride;
    const LogitMap map = rows.maps.of_row(index);
    const float* row = rows.row(index);
    T* gradient = reinterpret_cast<T*>(rows.row(index));
    const float* coefficients = arguments.coefficients + index;
    const float maximum = coefficients[0], log_sum = coefficients[stride], level = coefficients[2 * stride];
    const float slope = coefficients[3 * stride], at_target = coefficients[4 * stride];
    const int target = rows.target(index), before = misalignment(row);
    // Narrow vectors of a row that lies askew are askew as well.
    const bool vectors = before == 0 || sizeof(T) == sizeof(float);
    for (int64_t begin = -before; begin < rows.columns; begin += kHeadVectors * 4 * blockDim.x) {
        const HeadPass pass(begin, rows.columns);
        float values[kHeadVectors][4];
        pass.load(rows, row, values);
        // Where the target lies from this thread's first column on: 32 bits are enough for a pass.
        const int64_t distance = target - pass.own;
        const int place = distance >= 0 && distance < kHeadVectors * pass.step ? static_cast<int>(distance) : -1;
        HeadPass::each([&](int i, int j) {
            const float bounded = kCapped ? hyperbolic_tangent(values[i][j] * map.squeeze) : values[i][j];
            const float log_probability = bounded * map.factor - maximum - log_sum;
            values[i][j] = expf(log_probability) * fmaf(slope, fmaxf(log_probability, kFarthestLogit), level);
            values[i][j] += i * pass.step + j == place ? at_target : 0.0f;
            if constexpr (kCapped) values[i][j] *= slope_of_cap(bounded);
        });
        // Narrow numbers take the place of wide ones that other threads may still have to read, but only of this pass:
        // those behind it are never reached.
        __syncthreads();
        store_pass(pass, gradient, rows.columns, vectors, values);
    }
}

}  // namespace cuda
}  // namespace vgpo
