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

// The next larger segment of a tile than `segment`, INT32_MAX after the last; the same in every lane.
template <typename T>
__device__ int next_segment(const KeyInfo* infos, int segment) {
    unsigned next = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kStreamRows<T>; i += kWarpSize) {
        const int other = infos[i + lane_index()].segment;
        if (other > segment && static_cast<unsigned>(other) < next) next = static_cast<unsigned>(other);
    }
    return static_cast<int>(__reduce_min_sync(kAllLanes, next));
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
    float run[kTiles][2];                 // the part of it that is of segment `running` and in no other sum
    float sums[kOwnSegments][kTiles][2];  // by segment, in all columns; this lane has segments first + t, + t + 4
    int first_segment, running;
    float factor;  // of a score in units of ln 2; positive

    static constexpr int kBlocks = kStreamRows<T> / 8;

    __device__ StreamingSoftmax(int first, float factor) : first_segment(first), running(-1), factor(factor) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                largest[i][h] = -INFINITY;
                total[i][h] = run[i][h] = 0.0f;
#pragma unroll
                for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ int segment(int m) const { return first_segment + 4 * m + quad_place(); }

    // Begins a tile. Neighbouring keys mostly share a segment: then nothing is added up but their total.
    __device__ __forceinline__ void begin_tile(const TileSegments& segments) {
        const int shared_segment = segments.uniform() ? segments.lowest : -1;
        if (shared_segment != running) end_run(shared_segment);
    }

    // Takes in the scores of a tile, of which exponentials remain.
    __device__ __forceinline__ void add_scores(Scores<T, kTiles>& scores) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) add_row(scores[i], i, h);
        }
    }

    // Adds the exponentials of a tile of several segments to these.
    __device__ __forceinline__ void add_segments(const Scores<T, kTiles>& scores, const TileSegments& segments,
                                                 const KeyInfo* infos) {
        const int begin = segments.lowest > first_segment ? segments.lowest : first_segment;
        const int beyond = first_segment + kBlockSegments;
        const int end = segments.highest < beyond ? segments.highest + 1 : beyond;
#pragma unroll 1
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
            add_shares(shares, own);
        }
    }

    // Adds the run to its segment's sum, and begins one of another segment, or of none with -1.
    __device__ __forceinline__ void end_run(int next) {
        if (running >= 0) add_shares(run, running);
        running = next;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) run[i][h] = 0.0f;
        }
    }

   private:
    // Takes in a row's scores.
    __device__ __forceinline__ void add_row(float (&scores)[kBlocks][4], int i, int h) {
        float raised = -INFINITY;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) raised = fmaxf(raised, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
        raised = fmaxf(largest[i][h], quad_max(raised) * factor);
        // A row that has seen no key yet has no largest score, and its sums are zero whatever scales them.
        const float origin = raised == -INFINITY ? 0.0f : raised;
        const float shrink = power_of_two(largest[i][h] - origin);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 2 * h; c < 2 * h + 2; ++c) {
                scores[j][c] = power_of_two(fmaf(scores[j][c], factor, -origin));
                sum += scores[j][c];
            }
        }
        largest[i][h] = raised;
        total[i][h] = fmaf(total[i][h], shrink, sum);
        run[i][h] = fmaf(run[i][h], shrink, sum);
#pragma unroll
        for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] *= shrink;
    }

    // Adds the rows' shares of a segment, the columns of all four lanes, to the lane that has the segment.
    __device__ __forceinline__ void add_shares(const float (&lane_shares)[kTiles][2], int of_segment) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float share = quad_sum(lane_shares[i][h]);
#pragma unroll
                for (int m = 0; m < kOwnSegments; ++m) sums[m][i][h] += segment(m) == of_segment ? share : 0.0f;
            }
        }
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

// The factor of scores in units of ln 2. A scale of zero makes all of them equal, as the least number does: zero times
// the -infinity of a hidden score would be NaN.
__device__ __forceinline__ float softmax_factor(float scale) {
    const float factor = fabsf(scale * kLog2E);
    return factor == 0.0f ? __uint_as_float(1u) : factor;
}

// What the rows of a warp, 16 kTiles from `first` on, can see.
template <int kTiles>
struct WarpView {
    int positions[kTiles][2];  // of this lane's rows
    Positions all;
    bool all_see;  // every row sees something

    template <typename T>
    __device__ __forceinline__ WarpView(const QueryRows<T>& rows, int first) : all(Positions::identity()) {
        all_see = true;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = first + 16 * i + 8 * h + quad_index();
                positions[i][h] = rows.position(row);
                all.merge(Positions::of(positions[i][h]));
                all_see = all_see && (positions[i][h] >= 0 || row >= rows.count);
            }
        }
        all = warp_reduce(all);
        all_see = __all_sync(kAllLanes, all_see) != 0;
    }
};

// Adds a tile's scores to the sums of a warp's rows.
template <typename T, int kTiles>
__device__ __forceinline__ void add_tile(StreamingSoftmax<T, kTiles>& softmax, Scores<T, kTiles>& scores,
                                         const WarpView<kTiles>& view, const TileSegments& segments,
                                         const KeyInfo* infos, int first_key, int window) {
    softmax.begin_tile(segments);
    if (segments.uniform() && view.all_see && view.all.cover(first_key, kStreamRows<T>, window)) {
        softmax.add_scores(scores);
        return;
    }
    hide_unseen<T, kTiles>(scores, view.positions, infos, first_key, window);
    softmax.add_scores(scores);
    if (!segments.uniform()) softmax.add_segments(scores, segments, infos);
}

// Stores what the sums of a warp's rows, from `first` on, come to. All segments are there.
template <typename T, int kTiles>
__device__ __forceinline__ void store_masses(const StreamingSoftmax<T, kTiles>& softmax, const QueryRows<T>& rows,
                                             int first, const AttentionMassArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + 16 * i + 8 * h + quad_index();
            float total = quad_sum(softmax.total[i][h]);
            if (softmax.largest[i][h] == INFINITY) total = NAN;  // beside an infinite score nothing is finite
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
            if (softmax.first_segment == 0 && quad_place() == 0) {
                arguments.lse[index] = (softmax.largest[i][h] + log2f(divisor)) * kLn2;
            }
        }
    }
}

// A block computes the masses of some rows, the query heads that share a key head, in `kBlockSegments` segments.
template <typename T, int kSize = 0>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_mass_kernel(const __grid_constant__ AttentionMassArguments<T> arguments) {
    constexpr int kTiles = kForwardTiles<T>, kRows = block_rows(kTiles);
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, key_head = static_cast<int>(blockIdx.y);
    const int first_segment = static_cast<int>(blockIdx.z) * kBlockSegments;
    // The last queries see the most keys: begin with them.
    const BlockRows block = find_rows(input.query_boundaries, input.batch, input.queries, group, kRows,
                                      gridDim.x - 1 - blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T, kSize> shape(input.size);
    const SharedTiles<T, KeyInfo> shared(kRows, shape.pitch());

    const Positions seen = list_rows<kRows>(rows, block.first, shared.own_offsets());
    const int warp_row = block.first + warp_index() * 16 * kTiles;
    const WarpView<kTiles> view(rows, warp_row);

    copy_rows<kRows, true>(
        rows.data, input.aligned, shape, [&](int row) { return shared.own_offsets()[row]; }, shared.rows);
    // The largest score is found before scores are scaled, so a negative scale changes the queries' signs.
    OwnRows<T, kSize, kTiles> own_rows(shared.rows + (warp_row - block.first) * shape.pitch(), shape,
                                       input.scale < 0.0f ? kSigns<T> : 0u);
    StreamingSoftmax<T, kTiles> softmax(first_segment, softmax_factor(input.scale));
    const int last_key = seen.highest < keys.count ? seen.highest + 1 : keys.count;
    const auto describe = [&](int key) {
        const int segment = keys.segment(key);
        return KeyInfo{segment < 0 ? kNoRow : keys.offset(key), segment};
    };
    const auto use = [&](const unsigned char* tile, const KeyInfo* infos, int first_key) {
        if (!view.all.reach(first_key, kStreamRows<T>, window)) return;
        Scores<T, kTiles> scores;
        multiply_tiles<T, kSize, kTiles>(own_rows, tile, shape, scores);
        add_tile(softmax, scores, view, tile_segments<T>(infos), infos, first_key, window);
    };
    stream_rows<true>(keys.data, input.aligned, shape, shared, seen.oldest(window) / kStreamRows<T> * kStreamRows<T>,
                last_key, keys.token_stride, describe, [&] { own_rows.arrived(); }, use);
    softmax.end_run(-1);
    store_masses(softmax, rows, warp_row, arguments);
}

template <typename T>
LaunchShape launch_shape(const AttentionMassArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kRows = block_rows(kForwardTiles<T>);
    return {count_blocks(input.query_boundaries, input.batch, input.queries * input.group(), kRows), input.key_heads,
            ceil_div(input.num_segments, kBlockSegments),
            SharedTiles<T, KeyInfo>::bytes(kRows, TileShape<T, 0>(input.size).pitch())};
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

// The positions of a streamed tile of queries; the same in every lane.
struct TilePositions {
    Positions seen;
    bool complete;  // every query sees something
};

template <typename T>
__device__ TilePositions tile_positions(const RowInfo* infos) {
    unsigned lowest = INT32_MAX, beyond = 0;
    bool complete = true;
#pragma unroll
    for (int i = 0; i < kStreamRows<T>; i += kWarpSize) {
        const int position = infos[i + lane_index()].position;
        const auto low = static_cast<unsigned>(position), high = static_cast<unsigned>(position) + 1;
        lowest = low < lowest ? low : lowest;  // -1 is the largest of these
        beyond = high > beyond ? high : beyond;
        complete = complete && position >= 0;
    }
    lowest = __reduce_min_sync(kAllLanes, lowest);
    beyond = __reduce_max_sync(kAllLanes, beyond);
    return {{static_cast<int>(lowest), static_cast<int>(beyond) - 1}, __all_sync(kAllLanes, complete) != 0};
}

// A block adds up what some keys receive from the queries of one head.
template <typename T, int kSize = 0>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_heatmap_kernel(const __grid_constant__ AttentionHeatmapArguments<T> arguments) {
    constexpr int kTiles = kForwardTiles<T>, kKeys = block_rows(kTiles), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int head = static_cast<int>(blockIdx.y), window = input.window;
    const BlockRows block = find_rows(input.key_boundaries, input.batch, input.keys, 1, kKeys, blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, head / input.group());
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, head, 1);
    const TileShape<T, kSize> shape(input.size);
    const SharedTiles<T, RowInfo> shared(kKeys, shape.pitch());

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
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kKeys) {
        const int key = block.first + thread;
        shared.own_offsets()[thread] = keys.segment(key) == kShown ? keys.offset(key) : kNoRow;
    }
    // Nothing is to be found out in a block without a key to show.
    if (__syncthreads_or(any) != 0) {
        copy_rows<kKeys, true>(
            keys.data, input.aligned, shape, [&](int key) { return shared.own_offsets()[key]; }, shared.rows);
        OwnRows<T, kSize, kTiles> own_rows(shared.rows + (warp_key - block.first) * shape.pitch(), shape, 0u);
        const auto describe = [&](int row) {
            RowInfo info = RowInfo::none();
            if (row >= rows.count) return info;
            info.weight = arguments.weights[rows.token_begin + row];
            info.position = info.weight == 0.0f ? -1 : rows.position(row);
            info.offset = info.position < 0 ? kNoRow : rows.offset(row);
            info.logarithm = arguments.lse[rows.head_token(row)] * kLog2E;
            return info;
        };
        const float factor = input.scale * kLog2E;
        const auto use = [&](const unsigned char* tile, const RowInfo* infos, int) {
            const TilePositions positions = tile_positions<T>(infos);
            if (!warp_shows || !positions.seen.reach(warp_key, 16 * kTiles, window)) return;
            Scores<T, kTiles> scores;
            multiply_tiles<T, kSize, kTiles>(own_rows, tile, shape, scores);
            // What a key receives that is not shown is left out at the end.
            const auto add = [&](auto is_visible) {
#pragma unroll
                for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const RowInfo& row = infos[8 * j + 2 * quad_place() + c];
#pragma unroll
                        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                const float score = scores[i][j][2 * h + c];
                                const float share = power_of_two(fmaf(score, factor, -row.logarithm)) * row.weight;
                                const int key = warp_key + 16 * i + 8 * h + quad_index();
                                received[i][h] += is_visible(row.position, key) ? share : 0.0f;
                            }
                        }
                    }
                }
            };
            if (positions.complete && positions.seen.cover(warp_key, 16 * kTiles, window)) {
                add([](int, int) { return true; });
            } else {
                add([&](int position, int key) { return sees(position, key, window); });
            }
        };
        const RowRange seeing = rows_that_see(rows, block.first, kKeys, window);
        stream_rows<true>(rows.data, input.aligned, shape, shared, seeing.first / kStreamRows<T> * kStreamRows<T>, seeing.end,
                    rows.token_stride, describe, [&] { own_rows.arrived(); }, use);
    }
    const int64_t heat_begin = input.head_index(block.response, keys.token_begin, head, input.keys);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = warp_key + 16 * i + 8 * h + quad_index();
            const float sum = quad_sum(received[i][h]);
            if (key < keys.count && quad_place() == 0) arguments.heat[heat_begin + key] = shown[i][h] ? sum : 0.0f;
        }
    }
}

template <typename T>
LaunchShape launch_shape(const AttentionHeatmapArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kKeys = block_rows(kForwardTiles<T>);
    return {count_blocks(input.key_boundaries, input.batch, input.keys, kKeys), input.heads, 1,
            SharedTiles<T, RowInfo>::bytes(kKeys, TileShape<T, 0>(input.size).pitch())};
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
