// Attention by segment and by key: tiles of queries stream past the keys they see, as in flash attention, but no values
// are read and no output of d components is kept. What leaves is one number per query and segment, or one per key.
//
// Cost: the products of queries and keys, 2 d operations a pair, once (and again for every eight segments beyond the
// first eight); one exponential a pair. Of memory next to nothing: every block reads the keys it sees, through the
// cache. At 28 query heads, 4 key heads, d = 128, 2,048 queries and 3,072 keys that is 30 GFLOP on the tensor cores.
#pragma once

#include "attention_tiles.cuh"

namespace vgpo {
namespace cuda {

// Segments that a block of the forward pass adds up: two a lane of the four that share a row.
constexpr int kOwnSegments = 2;
constexpr int kBlockSegments = 4 * kOwnSegments;

// The segments of a streamed tile of keys; the same in every lane.
struct TileSegments {
    int lowest, highest;  // of those that count; highest is -1 without any
    bool complete;        // no key is ignored

    __device__ bool uniform() const { return complete && lowest == highest; }
};

template <typename T>
__device__ TileSegments tile_segments(const KeyInfo* infos) {
    unsigned lowest = UINT32_MAX, highest = 0;
    bool complete = true;
#pragma unroll
    for (int i = 0; i < kStreamRows<T>; i += kWarpSize) {
        const int segment = infos[i + lane_index()].segment;
        const unsigned low = static_cast<unsigned>(segment), high = static_cast<unsigned>(segment + 1);
        lowest = low < lowest ? low : lowest;  // -1 is the largest of these
        highest = high > highest ? high : highest;
        complete = complete && segment >= 0;
    }
    lowest = __reduce_min_sync(kAllLanes, lowest);
    highest = __reduce_max_sync(kAllLanes, highest);
    return {static_cast<int>(lowest), static_cast<int>(highest) - 1, __all_sync(kAllLanes, complete) != 0};
}

// ---- masses ----------------------------------------------------------------------------------------------------

template <typename T>
struct AttentionMassArguments {
    AttentionInput<T> input;
    float* mass;  // [B, Hq, T, G] or [Hq, N, G]
    float* lse;   // [B, Hq, T] or [Hq, N]
};

// Of the rows of a lane (16 a tile, g and g + 8 of these) the softmax so far, by segment.
template <typename T, int kTiles>
struct StreamingSoftmax {
    float largest[kTiles][2];             // score so far, in units of ln 2
    float total[kTiles][2];               // of the exponentials relative to it, in this lane's columns
    float sums[kOwnSegments][kTiles][2];  // by segment, in all columns; this lane has segments first + t, + t + 4
    int first_segment;

    static constexpr int kBlocks = kStreamRows<T> / 8;

    __device__ explicit StreamingSoftmax(int first) : first_segment(first) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                largest[i][h] = -INFINITY;
                total[i][h] = 0.0f;
#pragma unroll
                for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ int segment(int m) const { return first_segment + 4 * m + quad_place(); }

    // Takes in the scores of a tile, in units of ln 2, of which exponentials remain.
    __device__ __forceinline__ void add_tile(Scores<T, kTiles>& scores, const TileSegments& segments,
                                             const KeyInfo* infos) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float tile_total = add_row(scores[i], i, h);
                // Neighbouring keys mostly share a segment, and then their sum is there already.
                if (segments.uniform()) add_share(tile_total, segments.lowest, i, h);
            }
        }
        if (segments.uniform()) return;
        const int begin = segments.lowest > first_segment ? segments.lowest : first_segment;
        const int beyond = first_segment + kBlockSegments;
        const int end = segments.highest < beyond ? segments.highest + 1 : beyond;
        for (int own = begin; own < end; ++own) {
            float shares[kTiles][2] = {};
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const bool member = infos[8 * j + 2 * quad_place() + c].segment == own;
#pragma unroll
                    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) shares[i][h] += member ? scores[i][j][2 * h + c] : 0.0f;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) add_share(shares[i][h], own, i, h);
            }
        }
    }

   private:
    // Takes in a row's scores, and returns the sum of their exponentials in this lane's columns.
    __device__ __forceinline__ float add_row(float (&scores)[kBlocks][4], int i, int h) {
        float raised = -INFINITY;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) raised = fmaxf(raised, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
        raised = fmaxf(largest[i][h], quad_max(raised));
        // A row that has seen no key yet has no largest score, and its sums are zero whatever scales them.
        const float origin = raised == -INFINITY ? 0.0f : raised;
        const float shrink = exp2f(largest[i][h] - origin);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 2 * h; c < 2 * h + 2; ++c) {
                scores[j][c] = exp2f(scores[j][c] - origin);
                sum += scores[j][c];
            }
        }
        largest[i][h] = raised;
        total[i][h] = total[i][h] * shrink + sum;
#pragma unroll
        for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] *= shrink;
        return sum;
    }

    // Adds a row's share of a segment, the columns of all four lanes, to the lane that has the segment.
    __device__ __forceinline__ void add_share(float lane_share, int of_segment, int i, int h) {
        const float share = quad_sum(lane_share);
#pragma unroll
        for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] += segment(m) == of_segment ? share : 0.0f;
    }
};

// Scores of keys that a row does not see become -infinity.
template <typename T, int kTiles>
__device__ __forceinline__ void hide_unseen(Scores<T, kTiles>& scores, const int (&positions)[kTiles][2],
                                            const KeyInfo* infos, int first_key, int window) {
#pragma unroll
    for (int j = 0; j < kStreamRows<T> / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int column = 8 * j + 2 * quad_place() + c;
            const bool counted = infos[column].segment >= 0;
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool visible = counted && sees(positions[i][h], first_key + column, window);
                    scores[i][j][2 * h + c] = visible ? scores[i][j][2 * h + c] : -INFINITY;
                }
            }
        }
    }
}

// A block computes the masses of some rows, the query heads that share a key head, in `kBlockSegments` segments.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_mass_kernel(const __grid_constant__ AttentionMassArguments<T> arguments) {
    constexpr int kTiles = kForwardTiles<T>, kRows = block_rows(kTiles), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, key_head = static_cast<int>(blockIdx.y);
    const int first_segment = static_cast<int>(blockIdx.z) * kBlockSegments;
    // The last queries see the most keys: begin with them.
    const BlockRows block = find_rows(input.query_boundaries, input.batch, input.queries, group, kRows,
                                      gridDim.x - 1 - blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T> shape(input.size);
    const SharedTiles<T, KeyInfo> shared(kRows, shape.pitch);

    const int thread = static_cast<int>(threadIdx.x);
    const Positions seen =
        block_reduce(thread < kRows ? Positions::of(rows.position(block.first + thread)) : Positions::identity());
    const int warp_row = block.first + warp_index() * 16 * kTiles;
    int positions[kTiles][2];
    Positions own = Positions::identity();
    bool all_see = true;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * i + 8 * h + quad_index();
            positions[i][h] = rows.position(row);
            own.merge(Positions::of(positions[i][h]));
            all_see = all_see && (positions[i][h] >= 0 || row >= rows.count);
        }
    }
    own = warp_reduce(own);
    all_see = __all_sync(kAllLanes, all_see) != 0;

    copy_rows<T>(
        rows.data, input.aligned, shape, kRows,
        [&](int row) { return rows.position(block.first + row) < 0 ? -1 : rows.offset(block.first + row); },
        shared.rows);
    StreamingSoftmax<T, kTiles> softmax(first_segment);
    const float factor = input.scale * kLog2E;
    const int last_key = seen.highest < keys.count ? seen.highest + 1 : keys.count;
    const auto describe = [&](int key) {
        const int segment = keys.segment(key);
        return KeyInfo{segment < 0 ? -1 : keys.offset(key), segment};
    };
    const auto use = [&](const unsigned char* tile, const KeyInfo* infos, int first_key) {
        if (!own.reach(first_key, kStreamRows<T>, window)) return;
        Scores<T, kTiles> scores;
        multiply_tiles<T, kTiles>(shared.rows + (warp_row - block.first) * shape.pitch, tile, shape, scores);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) scores[i][j][c] *= factor;
            }
        }
        const TileSegments segments = tile_segments<T>(infos);
        const bool whole = segments.complete && all_see && own.lowest >= first_key + kStreamRows<T> - 1 &&
                           (window == 0 || own.highest - first_key < window);
        if (!whole) hide_unseen<T, kTiles>(scores, positions, infos, first_key, window);
        softmax.add_tile(scores, segments, infos);
    };
    stream_rows(keys.data, input.aligned, shape, shared, seen.oldest(window) / kStreamRows<T> * kStreamRows<T>,
                last_key, describe, use);

#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * i + 8 * h + quad_index();
            const float total = quad_sum(softmax.total[i][h]);
            // A row that sees no key has sums of zero: its masses stay zero, and its log-sum-exp -infinity.
            const float divisor = total == 0.0f ? 1.0f : total;
            if (row >= rows.count) continue;
            const int64_t index = rows.head_token(row);
#pragma unroll
            for (int m = 0; m < kOwnSegments; ++m) {
                const int segment = softmax.segment(m);
                if (segment < input.num_segments) {
                    arguments.mass[index * input.num_segments + segment] = softmax.sums[m][i][h] / divisor;
                }
            }
            if (first_segment == 0 && quad_place() == 0) {
                arguments.lse[index] = (softmax.largest[i][h] + log2f(divisor)) * kLn2;
            }
        }
    }
}

template <typename T>
LaunchShape launch_shape(const AttentionMassArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kRows = block_rows(kForwardTiles<T>);
    return {count_blocks(input.query_boundaries, input.batch, input.queries * input.group(), kRows), input.key_heads,
            ceil_div(input.num_segments, kBlockSegments),
            SharedTiles<T, KeyInfo>::bytes(kRows, TileShape<T>(input.size).pitch)};
}

// ---- heat map --------------------------------------------------------------------------------------------------

template <typename T>
struct AttentionHeatmapArguments {
    AttentionInput<T> input;  // segments: kShown, or another label
    const float* weights;     // [B, T] or [N]
    const float* lse;         // [B, Hq, T] or [Hq, N]
    float* heat;              // [B, Hq, S] or [Hq, M]
};

struct RowRange {
    int first, end;
};

// The rows whose default positions let them see a key of [key, key + count); all rows where positions are given.
template <typename T>
__device__ RowRange rows_that_see(const QueryRows<T>& rows, int key, int count, int window) {
    if (rows.positions != nullptr) return {0, rows.count};
    const int64_t oldest = static_cast<int64_t>(key) - rows.first_position();
    const int64_t newest = window == 0 ? INT32_MAX : oldest + count - 1 + window;
    const int tokens = rows.tokens;
    const int64_t first = oldest < 0 ? 0 : (oldest > tokens ? tokens : oldest);
    const int64_t end = newest < first ? first : (newest > tokens ? tokens : newest);
    return {static_cast<int>(first) * rows.group, static_cast<int>(end) * rows.group};
}

// A block adds up what some keys receive from the queries of one head.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_heatmap_kernel(const __grid_constant__ AttentionHeatmapArguments<T> arguments) {
    constexpr int kTiles = kForwardTiles<T>, kKeys = block_rows(kTiles), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int head = static_cast<int>(blockIdx.y), window = input.window;
    const BlockRows block = find_rows(input.key_boundaries, input.batch, input.keys, 1, kKeys, blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, head / input.group());
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, head, 1);
    const TileShape<T> shape(input.size);
    const SharedTiles<T, RowInfo> shared(kKeys, shape.pitch);

    const int warp_key = block.first + warp_index() * 16 * kTiles;
    bool shown[kTiles][2], any = false;
    float received[kTiles][2] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            shown[i][h] = keys.segment(warp_key + 16 * i + 8 * h + quad_index()) == kShown;
            any = any || shown[i][h];
        }
    }
    const bool warp_shows = __any_sync(kAllLanes, any) != 0;
    // Nothing is to be found out in a block without a key to show.
    if (__syncthreads_or(any) != 0) {
        copy_rows<T>(
            keys.data, input.aligned, shape, kKeys,
            [&](int key) { return keys.segment(block.first + key) == kShown ? keys.offset(block.first + key) : -1; },
            shared.rows);
        const auto describe = [&](int row) {
            RowInfo info = {-1, 0, -1, 0.0f, 0.0f, 0.0f};
            if (row >= rows.count) return info;
            info.weight = arguments.weights[rows.token_begin + row];
            info.position = info.weight == 0.0f ? -1 : rows.position(row);
            info.offset = info.position < 0 ? -1 : rows.offset(row);
            info.logarithm = arguments.lse[rows.head_token(row)] * kLog2E;
            return info;
        };
        const float factor = input.scale * kLog2E;
        const auto use = [&](const unsigned char* tile, const RowInfo* infos, int) {
            Positions seen = Positions::identity();
#pragma unroll
            for (int i = 0; i < kStreamRows<T>; i += kWarpSize) {
                seen.merge(Positions::of(infos[i + lane_index()].position));
            }
            if (!warp_shows || !warp_reduce(seen).reach(warp_key, 16 * kTiles, window)) return;
            Scores<T, kTiles> scores;
            multiply_tiles<T, kTiles>(shared.rows + (warp_key - block.first) * shape.pitch, tile, shape, scores);
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const RowInfo& row = infos[8 * j + 2 * quad_place() + c];
#pragma unroll
                    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int key = warp_key + 16 * i + 8 * h + quad_index();
                            const float probability = exp2f(scores[i][j][2 * h + c] * factor - row.logarithm);
                            const bool visible = shown[i][h] && sees(row.position, key, window);
                            received[i][h] += visible ? probability * row.weight : 0.0f;
                        }
                    }
                }
            }
        };
        const RowRange seeing = rows_that_see(rows, block.first, kKeys, window);
        stream_rows(rows.data, input.aligned, shape, shared, seeing.first / kStreamRows<T> * kStreamRows<T>, seeing.end,
                    describe, use);
    }
    const int64_t heat_begin = input.head_index(block.response, keys.token_begin, head, input.keys);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = warp_key + 16 * i + 8 * h + quad_index();
            const float sum = quad_sum(received[i][h]);
            if (key < keys.count && quad_place() == 0) arguments.heat[heat_begin + key] = sum;
        }
    }
}

template <typename T>
LaunchShape launch_shape(const AttentionHeatmapArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kKeys = block_rows(kForwardTiles<T>);
    return {count_blocks(input.key_boundaries, input.batch, input.keys, kKeys), input.heads, 1,
            SharedTiles<T, RowInfo>::bytes(kKeys, TileShape<T>(input.size).pitch)};
}

// ---- mean over heads -------------------------------------------------------------------------------------------

struct HeadMeanArguments {
    const float* values;  // [batch, heads, count]
    float* mean;          // [batch, count]
    int64_t batch;
    int heads;
    int64_t count;
};

// Heads are added up in their order, whatever the layout.
template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads) head_mean_kernel(const __grid_constant__ HeadMeanArguments arguments) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t results = arguments.batch * arguments.count;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < results; i += step) {
        const float* first = arguments.values + i / arguments.count * arguments.heads * arguments.count +
                             i % arguments.count;
        float total = 0.0f;
#pragma unroll 4
        for (int head = 0; head < arguments.heads; ++head) total += first[head * arguments.count];
        arguments.mean[i] = total / static_cast<float>(arguments.heads);
    }
}

}  // namespace cuda
}  // namespace vgpo
