// An LM head on Hopper without logits in memory: matrix products whose tiles end in what a head is for.
//
// A cluster of two blocks computes a tile of 256 rows by 256 columns of logits at a time, each block its 128 rows. In a
// block one warpgroup copies (it needs hardly a register) and two multiply, 64 rows each: 128 fp32 sums a thread.
// Hidden states and weight stream through kStages places in shared memory; each block fetches half of the weight's box
// for both. A tile's sums end in registers, in an epilogue: statistics of its rows, 16 bytes for 256 logits, or the
// gradient w.r.t. its logits in the narrow type. While one warpgroup is there, the other multiplies what has been
// fetched ahead: on an H200 the statistics cost nothing beside the products (6.20 ms with them, 6.18 ms without).
//
// What is computed of a row depends on no other row: other batches, the same bits.
#pragma once

#include "hopper.cuh"
#include "linear_logprob.cuh"

namespace vgpo {
namespace cuda {

constexpr int kTileRows = 128, kTileColumns = 256;  // of a block
constexpr int kClusterBlocks = 2, kClusterRows = kClusterBlocks * kTileRows;
constexpr uint16_t kEveryBlock = (1 << kClusterBlocks) - 1;
constexpr int kTileThreads = 3 * kWarpgroupThreads;
constexpr int kStages = 4;
constexpr int kHiddenBytes = kTileRows * kBoxBytes, kWeightBytes = kTileColumns * kBoxBytes;
constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
constexpr int kBoxRows = 128;  // of both maps
constexpr int kTileSharedBytes = kStages * kStageBytes + kBoxAlignment;
// Hidden states of a group of rows, which stay in the cache while the weight streams by.
constexpr int64_t kGroupBytes = 16 << 20;

struct TileRows {
    CUtensorMap hidden;  // [N, D], boxes of 128 rows and 128 bytes
    CUtensorMap weight;  // [V, D]
    int rows, columns, dim;
    int group;  // clusters' worth of rows whose hidden states take kGroupBytes
    const int64_t* targets;  // [N]
    int64_t first;
    float factor;  // one over the temperature
};

// Tiles in the order in which clusters take them: groups of rows, in a group column by column.
struct TileOrder {
    int row_clusters, column_tiles, group;

    __host__ __device__ explicit TileOrder(const TileRows& rows)
        : row_clusters(ceil_div(rows.rows, kClusterRows)),
          column_tiles(ceil_div(rows.columns, kTileColumns)),
          group(rows.group) {}

    __host__ __device__ int count() const { return row_clusters * column_tiles; }
    // The first row of a cluster's tile, and its first column.
    __device__ void place(int index, int& row, int& column) const {
        const int begin = index / (group * column_tiles) * group;
        const int width = min(group, row_clusters - begin), rest = index - begin * column_tiles;
        row = (begin + rest % width) * kClusterRows;
        column = rest / width * kTileColumns;
    }
};

// The columns of a tile that are targets of a thread's two rows, relative to the tile; -1 elsewhere. Read before the
// products, which hide it.
struct TileTargets {
    int column[2];

    __device__ __forceinline__ TileTargets(const TileRows& rows, int row, int first_column) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + 8 * half;
            int64_t place = -1;
            if (own < rows.rows) place = column_of(rows.targets[own], rows.first, rows.columns) - first_column;
            // Of a quad's threads, only one holds the sum.
            const bool here = place >= 0 && place < kTileColumns && place / 2 % 4 == quad_place();
            column[half] = here ? static_cast<int>(place) : -1;
        }
    }
};

// The sums of a thread in one of its two rows, by place: place i lies in column 8 (i / 2) + 2 t + i % 2.
constexpr int kRowSums = kProductSums / 2;

__device__ __forceinline__ float& sum_at(float (&sums)[kProductSums], int half, int place) {
    return sums[place / 2 * 4 + 2 * half + place % 2];
}

// Looks a sum up by its column. Registers have no index: all are asked.
__device__ __forceinline__ float sum_in(float (&sums)[kProductSums], int half, int column) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowSums; ++i) {
        if (column / 8 * 2 + column % 2 == i) value = sum_at(sums, half, i);
    }
    return value;
}

// ---- statistics ------------------------------------------------------------------------------------------------

struct TileStatisticsArguments {
    TileRows rows;
    float4* parts;  // [V / 256, N]: statistics of the tiles' rows; the fourth number is not used
    float* at_target;  // [N], written where the target is one of the columns
};

struct StatisticsEpilogue {
    using Arguments = TileStatisticsArguments;

    __device__ __forceinline__ static void run(const Arguments& arguments, float (&sums)[kProductSums],
                                               const TileTargets& targets, int row, int column) {
        const TileRows& rows = arguments.rows;
        const int left = rows.columns - column;
        if (left < kTileColumns) {  // a copy has put zeros there
#pragma unroll
            for (int i = 0; i < kProductSums; ++i) {
                if (i / 4 * 8 + 2 * quad_place() + i % 2 >= left) sums[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + 8 * half;
            float largest = -INFINITY;
#pragma unroll
            for (int i = 0; i < kRowSums; ++i) largest = fmaxf(largest, sum_at(sums, half, i));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
            const float maximum = largest * rows.factor, origin = maximum == -INFINITY ? 0.0f : maximum;
            float total[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < kRowSums; ++i) {
                const float distance = fmaf(sum_at(sums, half, i), rows.factor, -origin);
                const float share = power_of_two(distance * kLog2E);
                total[i % 2] += share;
                weighted[i % 2] = fmaf(share, fmaxf(distance, kFarthestLogit), weighted[i % 2]);
            }
            float4 part = {maximum, total[0] + total[1], weighted[0] + weighted[1], 0.0f};
#pragma unroll
            for (int other = 1; other < 4; other *= 2) {
                part.y += __shfl_xor_sync(kAllLanes, part.y, other);
                part.z += __shfl_xor_sync(kAllLanes, part.z, other);
            }
            if (own < rows.rows && quad_place() == 0) {
                arguments.parts[static_cast<int64_t>(column / kTileColumns) * rows.rows + own] = part;
            }
            if (targets.column[half] >= 0) {
                arguments.at_target[own] = sum_in(sums, half, targets.column[half]) * rows.factor;
            }
        }
    }
};

constexpr int kMergeWarps = 16;

struct TileMergeArguments {
    const float4* parts;  // [tiles, N]
    int tiles, rows;
    float* statistics;  // [4, N], updated, but for the target
    int64_t statistics_stride;
};

// A warp of the block merges every kMergeWarps-th tile of 32 rows, and the first one the warps' results.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    head_merge_kernel(const __grid_constant__ TileMergeArguments arguments) {
    __shared__ LogitStatistics of_warps[kWarps][kWarpSize];
    const int row = static_cast<int>(blockIdx.x) * kWarpSize + lane_index(), warp = warp_index();
    if (row < arguments.rows) {
        LogitStatistics own = LogitStatistics::identity();
#pragma unroll 4
        for (int tile = warp; tile < arguments.tiles; tile += kWarps) {
            const float4 part = __ldcs(arguments.parts + static_cast<int64_t>(tile) * arguments.rows + row);
            own.merge({part.x, part.y, part.z});
        }
        of_warps[warp][lane_index()] = own;
    }
    __syncthreads();
    if (warp != 0 || row >= arguments.rows) return;
    float* running = arguments.statistics + row;
    const int64_t stride = arguments.statistics_stride;
    LogitStatistics all = LogitStatistics::load(running, stride);
    for (int i = 0; i < kWarps; ++i) all.merge(of_warps[i][lane_index()]);
    all.store(running, stride);
}

// ---- gradient --------------------------------------------------------------------------------------------------

struct TileGradientArguments {
    TileRows rows;
    const float* coefficients;  // [5, N]: maximum, log_sum, scale, slope, at_target
    int64_t coefficients_stride;
    void* gradient;  // [N, V], of the type of hidden
    int64_t stride;
    bool aligned;  // rows begin at multiples of 16 bytes
};

// Of four words of each thread of a quad: thread t gets word t of every thread, in the threads' order.
__device__ __forceinline__ void transpose_quad(unsigned (&words)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = (quad_place() & step) != 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            unsigned &low = words[step == 1 ? 2 * pair : pair], &high = words[step == 1 ? 2 * pair + 1 : pair + 2];
            const unsigned got = __shfl_xor_sync(kAllLanes, upper ? low : high, step);
            low = upper ? got : low;
            high = upper ? high : got;
        }
    }
}

template <typename T>
struct GradientEpilogue {
    using Arguments = TileGradientArguments;

    __device__ __forceinline__ static void run(const Arguments& arguments, float (&sums)[kProductSums],
                                               const TileTargets& targets, int row, int column) {
        const TileRows& rows = arguments.rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + 8 * half;
            const bool inside = own < rows.rows;
            const float* coefficients = arguments.coefficients + (inside ? own : 0);
            const int64_t stride = arguments.coefficients_stride;
            const float maximum = coefficients[0], log_sum = coefficients[stride], level = coefficients[2 * stride];
            const float slope = coefficients[3 * stride];
            const auto gradient = [&](float sum) {
                const float log_probability = fmaf(sum, rows.factor, -maximum) - log_sum;
                return power_of_two(log_probability * kLog2E) *
                       fmaf(slope, fmaxf(log_probability, kFarthestLogit), level);
            };
            T* to = static_cast<T*>(arguments.gradient) + own * arguments.stride + column;
#pragma unroll
            for (int block = 0; block < kTileColumns / 32; ++block) {
                unsigned words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int place = 8 * block + 2 * i;
                    words[i] = pack(gradient(sum_at(sums, half, place)), gradient(sum_at(sums, half, place + 1)),
                                    static_cast<const T*>(nullptr));
                }
                transpose_quad(words);  // so that a thread has 8 neighbouring columns
                const int begin = 32 * block + 8 * quad_place(), left = rows.columns - column - begin;
                if (inside && arguments.aligned && left >= 8) {
                    __stcs(reinterpret_cast<uint4*>(to + begin), make_uint4(words[0], words[1], words[2], words[3]));
                } else if (inside) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const unsigned short bits = static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16));
                        if (i < left) memcpy(to + begin + i, &bits, sizeof bits);
                    }
                }
            }
            __syncwarp();  // the target's place has been written by another thread of the quad
            if (targets.column[half] >= 0) {
                const float sum = sum_in(sums, half, targets.column[half]);
                store_float(to + targets.column[half], gradient(sum) + coefficients[4 * stride]);
            }
        }
    }
};

// ---- products --------------------------------------------------------------------------------------------------

template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kTileThreads, 1)
    head_tiles_kernel(const __grid_constant__ typename Epilogue::Arguments arguments) {
#ifdef VGPO_HAS_WARPGROUPS
    __shared__ uint64_t full[kStages], empty[kStages];
    const TileRows& rows = arguments.rows;
    unsigned char* stages = first_box();
    const auto hidden_box = [&](int stage) { return stages + stage * kStageBytes; };
    const auto weight_box = [&](int stage) { return stages + stage * kStageBytes + kHiddenBytes; };
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(&full[i], 1);
            init_barrier(&empty[i], 2 * kClusterBlocks);  // both multiplying warpgroups of both blocks
        }
        publish_barriers();
    }
    sync_cluster();

    const TileOrder order(rows);
    const int cluster = static_cast<int>(blockIdx.x) / kClusterBlocks;
    const int clusters = static_cast<int>(gridDim.x) / kClusterBlocks;
    const int steps = ceil_div(rows.dim, kBoxColumns<T>);
    int stage = 0;
    unsigned parity = 0;
    const auto next = [&] {
        stage = stage + 1 == kStages ? 0 : stage + 1;
        parity ^= stage == 0;
    };
    if (warpgroup == 2) {
        keep_registers<40>();
        if (threadIdx.x % kWarpgroupThreads == 0) {
            const int half = rank * kBoxRows;  // of the weight's box, which this block fetches for both
            for (int tile = cluster; tile < order.count(); tile += clusters) {
                int row, column;
                order.place(tile, row, column);
                for (int step = 0; step < steps; ++step) {
                    wait_for(&empty[stage], parity ^ 1);
                    expect_bytes(&full[stage], kStageBytes);
                    const int component = step * kBoxColumns<T>;
                    copy_box(hidden_box(stage), rows.hidden, row + rank * kTileRows, component, &full[stage]);
                    copy_box_to(kEveryBlock, weight_box(stage) + half * kBoxBytes, rows.weight, column + half,
                                component, &full[stage]);
                    next();
                }
            }
        }
    } else {
        take_registers<232>();
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
        for (int tile = cluster; tile < order.count(); tile += clusters) {
            int row, column;
            order.place(tile, row, column);
            row += rank * kTileRows + warpgroup * kProductRows + thread / kWarpSize * 16 + quad_index();
            const TileTargets targets(rows, row, column);
            float sums[kProductSums];
            int before = 0;
            for (int step = 0; step < steps; ++step) {
                wait_for(&full[stage], parity);
                const uint64_t left = operand_of(hidden_box(stage) + warpgroup * kProductRows * kBoxBytes);
                const uint64_t right = operand_of(weight_box(stage));
                begin_products();
#pragma unroll
                for (int i = 0; i < kBoxBytes / kStepBytes; ++i) {
                    multiply_group(sums, left + i * kOperandStep, right + i * kOperandStep, step + i > 0,
                                   static_cast<const T*>(nullptr));
                }
                end_products();
                // By now the products of the step before have read their boxes.
                wait_for_products<1>();
                if (step > 0 && thread < kClusterBlocks) arrive_at(&empty[before], thread);
                before = stage;
                next();
            }
            wait_for_products<0>();
            if (thread < kClusterBlocks) arrive_at(&empty[before], thread);
            Epilogue::run(arguments, sums, targets, row, column);
        }
    }
    // No block ends while others may still write into it.
    sync_cluster();
#endif
}

}  // namespace cuda
}  // namespace vgpo
