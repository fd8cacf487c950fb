// Gradients of attention by segment and by key, by recomputing the probabilities p from the log-sum-exp.
//
// A score's gradient is p (g - <p, g>), g being the gradient of p: that of its segment's mass, or of its key's heat
// times the query's weight. One kernel streams the keys past a tile of queries and gives q's gradient and <p, g>;
// another streams the queries past a tile of keys and gives k's. Neither adds to memory that another block writes.
#pragma once

#include "attention_mass.cuh"

namespace vgpo {
namespace cuda {

// Components whose gradient a block keeps; of longer heads, other blocks take the rest.
constexpr int kGradientComponents = 128;

template <typename T>
struct AttentionGradientArguments {
    AttentionInput<T> input;
    const float* grad;     // of the masses [B, Hq, T, G], or of the heat map [B, Hq, S]; packed without B
    const float* mass;     // [B, Hq, T, G]; null for a heat map
    const float* weights;  // [B, T]; null for masses
    const float* lse;      // [B, Hq, T]
    float* means;          // <p, g>, [B, Hq, T]
    HeadTensor<T> grad_q, grad_k;
};

// Of 16 rows of a warp, the components that this block keeps: all, if their number is known.
template <int kSize>
using GradientSums = float[(kSize == 0 ? kGradientComponents : kSize) / 8][4];

// Adds the products of slopes, 16 rows by a streamed tile, and the components of that tile.
template <typename T, int kSize>
__device__ __forceinline__ void add_gradients(const float (&slopes)[kStreamRows<T> / 8][4], const unsigned char* tile,
                                              const TileShape<T, kSize>& shape, int component, int components,
                                              GradientSums<kSize>& sums) {
    constexpr int kBlocks = sizeof(sums) / sizeof(sums[0]);
#pragma unroll
    for (int j = 0; j < kStreamRows<T> / 8; j += kStepBlocks<T>) {
        Left<T> left;
        left_of_sums<T>(left, slopes + j);
        const unsigned char* rows = tile + 8 * j * shape.pitch();
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2) {
            if (8 * block < components) {
                Right<T> right[2];
                load_right_of_rows<T>(right, rows, shape.pitch(), component + 8 * block);
                multiply_add<T>(sums[block], left, right[0]);
                multiply_add<T>(sums[block + 1], left, right[1]);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, bool both) {
    if constexpr (sizeof(T) == 2) {
        if (both && reinterpret_cast<uintptr_t>(to) % sizeof(unsigned) == 0) {
            *reinterpret_cast<unsigned*>(to) = pack(first, second, to);
            return;
        }
    }
    store_float(to, first);
    if (both) store_float(to + 1, second);
}

// Stores a lane's components of row g, or g + 8 with `half` 1.
template <int kBlocks, typename T>
__device__ __forceinline__ void store_gradients(const float (&sums)[kBlocks][4], int half, float scale, int component,
                                                int size, T* row) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const int own = component + 8 * block + 2 * quad_place();
        if (own < size) {
            store_pair(row + own, sums[block][2 * half] * scale, sums[block][2 * half + 1] * scale, own + 1 < size);
        }
    }
}

// For a row that takes no part, whatever its sums are.
template <int kBlocks>
__device__ __forceinline__ void clear(float (&sums)[kBlocks][4], int half) {
#pragma unroll
    for (auto& block : sums) block[2 * half] = block[2 * half + 1] = 0.0f;
}

template <int kBlocks>
__device__ __forceinline__ bool all_finite(const float (&sums)[kBlocks][4]) {
    bool finite = true;
#pragma unroll
    for (const auto& block : sums) {
#pragma unroll
        for (const float sum : block) finite = finite && is_finite(sum);
    }
    return finite;
}

// Whole steps of components from `component` on, as many as a block keeps.
template <typename T, int kSize>
__device__ __forceinline__ int kept_components(const TileShape<T, kSize>& shape, int component) {
    const int rest = shape.steps() * kStepSize<T> - component;
    return rest < kGradientComponents ? rest : kGradientComponents;
}

// How much the gradient of a mass exceeds their mean. That of a mass of zero is a constant's and may be anything.
template <typename T>
__device__ __forceinline__ float mass_excess(const AttentionGradientArguments<T>& arguments, int64_t index,
                                             float mean) {
    const float mass = arguments.mass[index], grad = arguments.grad[index];
    return (mass == 0.0f ? 0.0f : grad) - mean;
}

// ---- gradient of the queries -----------------------------------------------------------------------------------

template <typename T, bool kHeatmap, int kSize = 0>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_query_gradient_kernel(const __grid_constant__ AttentionGradientArguments<T> arguments) {
    constexpr int kRows = block_rows(1), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, num_segments = input.num_segments;
    const int key_head = static_cast<int>(blockIdx.y);
    const int component = kSize == 0 ? static_cast<int>(blockIdx.z) * kGradientComponents : 0;
    const BlockRows block = find_rows(input.query_boundaries, input.batch, input.queries, group, kRows,
                                      gridDim.x - 1 - blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T, kSize> shape(input.size);
    const SharedTiles<T, KeyInfo> shared(kRows, shape.pitch());

    const Positions seen = list_rows<kRows>(rows, block.first, shared.own_offsets());
    const int warp_row = block.first + warp_index() * 16;
    int positions[2];
    // Without a key to see a row's probabilities are 2^-inf, and what it gets is zero.
    float logarithms[2] = {INFINITY, INFINITY}, means[2] = {}, weights[2] = {};
    int64_t grads[2] = {};  // indices: of the row's masses, or of its head's heat map
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 8 * h + quad_index();
        positions[h] = rows.position(row);
        if (row >= rows.count) continue;
        const int64_t index = rows.head_token(row);
        if constexpr (kHeatmap) {
            weights[h] = arguments.weights[rows.token_begin + rows.token(row)];
            if (weights[h] == 0.0f) positions[h] = -1;
            grads[h] = input.head_index(block.response, keys.token_begin, key_head * group + rows.head(row), input.keys);
        } else {
            grads[h] = index * num_segments;
            for (int g = quad_place(); g < num_segments; g += 4) {
                const float mass = arguments.mass[grads[h] + g];
                // A mass of zero is a constant, whose gradient may be anything.
                if (mass != 0.0f) means[h] += mass * arguments.grad[grads[h] + g];
            }
        }
        if (positions[h] >= 0) logarithms[h] = arguments.lse[index] * kLog2E;
    }
    Positions own = Positions::of(positions[0]);
    own.merge(Positions::of(positions[1]));
    own = warp_reduce(own);

    copy_rows<kRows, true>(
        rows.data, input.aligned, shape, [&](int row) { return shared.own_offsets()[row]; }, shared.rows);
    OwnRows<T, kSize, 1> own_rows(shared.rows + (warp_row - block.first) * shape.pitch(), shape, 0u);
    const float factor = input.scale * kLog2E;
    const int first = seen.oldest(window) / kStreamRows<T> * kStreamRows<T>;
    const int end = seen.highest < keys.count ? seen.highest + 1 : keys.count;
    const auto describe = [&](int key) {
        const int segment = keys.segment(key);
        return KeyInfo{segment < 0 ? kNoRow : keys.offset(key), segment};
    };
    // Calls use(j, c, h, probability) for this lane's scores [j][c] of a tile, which are of its row h.
    const auto for_each_seen = [&](const Scores<T, 1>& scores, auto use) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                use(j, c, c / 2, power_of_two(fmaf(scores[0][j][c], factor, -logarithms[c / 2])));
            }
        }
    };
    // The same where not every key is seen: the probability of one that is not is zero.
    const auto for_each = [&](const Scores<T, 1>& scores, const KeyInfo* infos, int first_key, auto use) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int column = 8 * j + 2 * quad_place() + c % 2;
                const float value = power_of_two(fmaf(scores[0][j][c], factor, -logarithms[c / 2]));
                const bool visible =
                    infos[column].segment >= 0 && sees(positions[c / 2], first_key + column, window);
                use(j, c, c / 2, visible ? value : 0.0f);
            }
        }
    };
    // The gradient of the heat of the key of a score [j][c]; zero of one that is not shown, whose heat is a constant.
    const auto heat_gradient = [&](const KeyInfo* infos, int first_key, int j, int c) {
        const int column = 2 * quad_place() + 8 * j + c % 2;
        float grad = 0.0f;
        if (infos[column].segment == kShown) grad = (arguments.grad + grads[c / 2] + first_key)[column];
        return grad;
    };
    if constexpr (kHeatmap) {
        // Only keys that are shown have a gradient of their own.
        const auto add_means = [&](const unsigned char* tile, const KeyInfo* infos, int first_key) {
            const TileSegments segments = tile_segments<T>(infos);
            if (segments.highest < kShown || !own.reach(first_key, kStreamRows<T>, window)) return;
            Scores<T, 1> scores;
            multiply_tiles<T, kSize, 1>(own_rows, tile, shape, scores);
            for_each(scores, infos, first_key, [&](int j, int c, int h, float probability) {
                const float grad = heat_gradient(infos, first_key, j, c);
                // Where a query does not see a key, the gradient may be anything.
                if (probability != 0.0f) means[h] += probability * grad;
            });
        };
        stream_rows<true>(keys.data, input.aligned, shape, shared, first, end, keys.token_stride, describe,
                          [&] { own_rows.arrived(); }, add_means);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 8 * h + quad_index();
        means[h] = quad_sum(means[h]) * (kHeatmap ? weights[h] : 1.0f);
        if (component == 0 && row < rows.count && quad_place() == 0) arguments.means[rows.head_token(row)] = means[h];
    }

    GradientSums<kSize> sums = {};
    const int components = kept_components(shape, component);
    float excess[2] = {};  // of the masses' gradients in the segment `excess_of`
    int excess_of = -1;
    bool finite_keys = false;  // take what is not finite of a key as zero
    const auto add = [&](unsigned char* tile, const KeyInfo* infos, int first_key) {
        if (!finite_keys && !own.reach(first_key, kStreamRows<T>, window)) return;
        Scores<T, 1> scores;
        multiply_tiles<T, kSize, 1>(own_rows, tile, shape, scores);
        const TileSegments segments = tile_segments<T>(infos);
        const bool whole = segments.complete && own.cover(first_key, kStreamRows<T>, window);
        if constexpr (kHeatmap) {
            const auto slope = [&](int j, int c, int h, float probability) {
                const float excess = heat_gradient(infos, first_key, j, c) * weights[h] - means[h];
                scores[0][j][c] = probability == 0.0f ? 0.0f : probability * excess;
            };
            if (whole && segments.highest < kShown) {
                for_each_seen(scores, [&](int j, int c, int h, float probability) {
                    scores[0][j][c] = probability * -means[h];
                });
            } else {
                for_each(scores, infos, first_key, slope);
            }
        } else if (whole && segments.uniform()) {
            if (segments.lowest != excess_of) {
                excess_of = segments.lowest;
#pragma unroll
                for (int h = 0; h < 2; ++h) excess[h] = mass_excess(arguments, grads[h] + excess_of, means[h]);
            }
            for_each_seen(scores, [&](int j, int c, int h, float probability) {
                scores[0][j][c] = probability * excess[h];
            });
        } else {
            for_each(scores, infos, first_key, [&](int j, int c, int, float probability) {
                scores[0][j][c] = probability;
            });
#pragma unroll 1
            for (int segment = segments.lowest < 0 ? 0 : segments.lowest; segment <= segments.highest;
                 segment = next_segment<T>(infos, segment)) {
                float member_excess[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) member_excess[h] = mass_excess(arguments, grads[h] + segment, means[h]);
#pragma unroll
                for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const bool member = infos[8 * j + 2 * quad_place() + c % 2].segment == segment;
                        scores[0][j][c] *= member ? member_excess[c / 2] : 1.0f;
                    }
                }
            }
        }
        if (finite_keys) clear_not_finite(tile, shape);
        add_gradients(scores[0], tile, shape, component, components, sums);
    };
    // A slope of zero times NaN is NaN: a key that is not finite shows in queries of the block that do not see it. That
    // is rare, so keys are looked at only then.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        stream_rows<true>(keys.data, input.aligned, shape, shared, first, end, keys.token_stride, describe,
                          [&] { own_rows.arrived(); }, add);
        if (finite_keys || __syncthreads_or(!all_finite(sums)) == 0) break;
        finite_keys = true;
#pragma unroll
        for (auto& block : sums) {
#pragma unroll
            for (float& sum : block) sum = 0.0f;
        }
    }

    const int64_t query_begin = input.packed() ? rows.token_begin : 0;
    T* grad_q = arguments.grad_q.at(input.packed(), block.response, query_begin, key_head * group);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 8 * h + quad_index();
        if (row >= rows.count) continue;
        if (positions[h] < 0) clear(sums, h);
        T* to = grad_q + rows.token(row) * arguments.grad_q.token_stride + rows.head(row) * arguments.grad_q.head_stride;
        store_gradients(sums, h, input.scale, component, input.size, to);
    }
}

template <typename T>
LaunchShape query_gradient_shape(const AttentionGradientArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kRows = block_rows(1);
    return {count_blocks(input.query_boundaries, input.batch, input.queries * input.group(), kRows), input.key_heads,
            ceil_div(input.size, kGradientComponents),
            SharedTiles<T, KeyInfo>::bytes(kRows, TileShape<T, 0>(input.size).pitch())};
}

// ---- gradient of the keys --------------------------------------------------------------------------------------

template <typename T, bool kHeatmap, int kSize = 0>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_key_gradient_kernel(const __grid_constant__ AttentionGradientArguments<T> arguments) {
    constexpr int kKeys = block_rows(1), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, num_segments = input.num_segments;
    const int key_head = static_cast<int>(blockIdx.y);
    const int component = kSize == 0 ? static_cast<int>(blockIdx.z) * kGradientComponents : 0;
    const BlockRows block = find_rows(input.key_boundaries, input.batch, input.keys, 1, kKeys, blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T, kSize> shape(input.size);
    const SharedTiles<T, RowInfo> shared(kKeys, shape.pitch());

    const int warp_key = block.first + warp_index() * 16;
    int segments[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) segments[h] = keys.segment(warp_key + 8 * h + quad_index());
    const bool warp_counts = __any_sync(kAllLanes, segments[0] >= 0 || segments[1] >= 0) != 0;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kKeys) {
        const int key = block.first + thread;
        shared.own_offsets()[thread] = keys.segment(key) < 0 ? kNoRow : keys.offset(key);
    }
    Positions range = Positions::of(segments[0]);
    range.merge(Positions::of(segments[1]));
    range = block_reduce(range);
    GradientSums<kSize> sums = {};
    if (range.highest >= 0) {
        copy_rows<kKeys, true>(
            keys.data, input.aligned, shape, [&](int key) { return shared.own_offsets()[key]; }, shared.rows);
        OwnRows<T, kSize, 1> own_rows(shared.rows + (warp_key - block.first) * shape.pitch(), shape, 0u);
        const bool one_segment = range.lowest == range.highest;
        const auto describe = [&](int row) {
            RowInfo info = RowInfo::none();
            if (row >= rows.count) return info;
            const int64_t index = rows.head_token(row);
            info.position = rows.position(row);
            info.logarithm = arguments.lse[index] * kLog2E;
            // Without a visible key -inf, with a NaN NaN: then the slopes say all, and the query must not be read.
            info.offset = info.position < 0 || !is_finite(info.logarithm) ? kNoRow : rows.offset(row);
            info.mean = arguments.means[index];
            if constexpr (kHeatmap) {
                info.weight = arguments.weights[rows.token_begin + rows.token(row)];
                if (info.weight == 0.0f) info.position = -1;
                const int head = key_head * group + rows.head(row);
                info.grad = input.head_index(block.response, keys.token_begin, head, input.keys);
            } else {
                info.grad = index * num_segments;
                if (one_segment) info.weight = mass_excess(arguments, info.grad + range.lowest, info.mean);
            }
            return info;
        };
        const int components = kept_components(shape, component);
        const float factor = input.scale * kLog2E;
        const auto use = [&](const unsigned char* tile, const RowInfo* infos, int) {
            const TilePositions positions = tile_positions<T>(infos);
            if (!warp_counts || !positions.seen.reach(warp_key, 16, window)) return;
            Scores<T, 1> scores;
            multiply_tiles<T, kSize, 1>(own_rows, tile, shape, scores);
            // Turns scores into slopes. Those of a key that does not count are left out at the end.
            const auto slopes = [&](auto is_visible, auto excess) {
#pragma unroll
                for (int j = 0; j < kBlocks; ++j) {
                    if (kHeatmap && j % 2 == 0) __syncwarp();  // or more loads begin than registers hold
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const RowInfo& row = infos[8 * j + 2 * quad_place() + c];
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float& score = scores[0][j][2 * h + c];
                            const float probability = power_of_two(fmaf(score, factor, -row.logarithm));
                            const bool visible = is_visible(row.position, warp_key + 8 * h + quad_index());
                            const float slope = probability * excess(row, h);
                            score = visible ? slope : 0.0f;
                        }
                    }
                }
            };
            const auto all = [](int, int) { return true; };
            const auto some = [&](int position, int key) { return sees(position, key, window); };
            // The next larger segment of the warp's keys, INT32_MAX after the last.
            const auto next_of = [&](int segment) {
                unsigned next = INT32_MAX;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (segments[h] > segment && static_cast<unsigned>(segments[h]) < next) next = segments[h];
                }
                return static_cast<int>(__reduce_min_sync(kAllLanes, next));
            };
            const bool whole = positions.complete && positions.seen.cover(warp_key, 16, window);
            if constexpr (kHeatmap) {
                const auto excess = [&](const RowInfo& row, int h) {
                    float grad = 0.0f;
                    if (segments[h] == kShown) grad = (arguments.grad + row.grad + warp_key + quad_index())[8 * h];
                    return grad * row.weight - row.mean;
                };
                if (whole) slopes(all, excess);
                else slopes(some, excess);
            } else if (one_segment) {
                const auto excess = [](const RowInfo& row, int) { return row.weight; };
                if (whole) slopes(all, excess);
                else slopes(some, excess);
            } else {
                slopes(some, [](const RowInfo&, int) { return 1.0f; });
#pragma unroll 1
                for (int segment = next_of(-1); segment <= range.highest; segment = next_of(segment)) {
#pragma unroll
                    for (int j = 0; j < kBlocks; ++j) {
                        __syncwarp();  // or the compiler begins more loads than registers hold
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            const RowInfo& row = infos[8 * j + 2 * quad_place() + c % 2];
                            const float excess = mass_excess(arguments, row.grad + segment, row.mean);
                            // What is not seen stays zero beside a NaN.
                            const bool member = segments[c / 2] == segment && scores[0][j][c] != 0.0f;
                            scores[0][j][c] *= member ? excess : 1.0f;
                        }
                    }
                }
            }
            add_gradients(scores[0], tile, shape, component, components, sums);
        };
        const RowRange seeing = rows_that_see(rows, block.first, kKeys, window);
        stream_rows<false>(rows.data, input.aligned, shape, shared, seeing.first / kStreamRows<T> * kStreamRows<T>,
                           seeing.end, 0, describe, [&] { own_rows.arrived(); }, use);
    }
    T* grad_k = arguments.grad_k.at(input.packed(), block.response, keys.token_begin, key_head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int key = warp_key + 8 * h + quad_index();
        if (key >= keys.count) continue;
        if (segments[h] < 0) clear(sums, h);
        store_gradients(sums, h, input.scale, component, input.size, grad_k + key * arguments.grad_k.token_stride);
    }
}

template <typename T>
LaunchShape key_gradient_shape(const AttentionGradientArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kKeys = block_rows(1);
    return {count_blocks(input.key_boundaries, input.batch, input.keys, kKeys), input.key_heads,
            ceil_div(input.size, kGradientComponents),
            SharedTiles<T, RowInfo>::bytes(kKeys, TileShape<T, 0>(input.size).pitch())};
}

}  // namespace cuda
}  // namespace vgpo
