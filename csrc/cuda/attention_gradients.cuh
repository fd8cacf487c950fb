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

    __device__ bool heatmap() const { return weights != nullptr; }
};

// Of 16 rows of a warp, the components that this block keeps.
using GradientSums = float[kGradientComponents / 8][4];

// Adds the products of slopes, 16 rows by a streamed tile, and the components of that tile.
template <typename T>
__device__ __forceinline__ void add_gradients(const float (&slopes)[kStreamRows<T> / 8][4], const unsigned char* tile,
                                              const TileShape<T>& shape, int component, int components,
                                              GradientSums& sums) {
#pragma unroll
    for (int j = 0; j < kStreamRows<T> / 8; j += kStepBlocks<T>) {
        Left<T> left;
        left_of_sums<T>(left, slopes + j);
        const unsigned char* rows = tile + 8 * j * shape.pitch;
#pragma unroll
        for (int block = 0; block < kGradientComponents / 8; block += 2) {
            if (8 * block < components) {
                Right<T> right[2];
                load_right_of_rows<T>(right, rows, shape.pitch, component + 8 * block);
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
template <typename T>
__device__ __forceinline__ void store_gradients(const GradientSums& sums, int half, float scale, int component,
                                                int size, T* row) {
#pragma unroll
    for (int block = 0; block < kGradientComponents / 8; ++block) {
        const int own = component + 8 * block + 2 * quad_place();
        if (own < size) {
            store_pair(row + own, sums[block][2 * half] * scale, sums[block][2 * half + 1] * scale, own + 1 < size);
        }
    }
}

__device__ __forceinline__ bool all_finite(const GradientSums& sums) {
    bool finite = true;
#pragma unroll
    for (const auto& block : sums) {
#pragma unroll
        for (const float sum : block) finite = finite && is_finite(sum);
    }
    return finite;
}

// Whole steps of components from `component` on, as many as a block keeps.
template <typename T>
__device__ __forceinline__ int kept_components(const TileShape<T>& shape, int component) {
    const int rest = shape.steps * kStepSize<T> - component;
    return rest < kGradientComponents ? rest : kGradientComponents;
}

// ---- gradient of the queries -----------------------------------------------------------------------------------

// Of a multiprocessor: in fp32 a warp holds half the rows of a tile, so a third fits into the registers.
template <typename T>
constexpr int kQueryGradientBlocks = sizeof(T) == 2 ? kAttentionBlocks : 3;

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kQueryGradientBlocks<T>)
    attention_query_gradient_kernel(const __grid_constant__ AttentionGradientArguments<T> arguments) {
    constexpr int kRows = block_rows(1), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, num_segments = input.num_segments;
    const int key_head = static_cast<int>(blockIdx.y), component = static_cast<int>(blockIdx.z) * kGradientComponents;
    const BlockRows block = find_rows(input.query_boundaries, input.batch, input.queries, group, kRows,
                                      gridDim.x - 1 - blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T> shape(input.size);
    const SharedTiles<T, KeyInfo> shared(kRows, shape.pitch);

    const int thread = static_cast<int>(threadIdx.x);
    const Positions seen =
        block_reduce(thread < kRows ? Positions::of(rows.position(block.first + thread)) : Positions::identity());
    const int warp_row = block.first + warp_index() * 16;
    int positions[2];
    float logarithms[2] = {}, means[2] = {}, weights[2] = {};
    const float* grads[2];  // of the row's masses, or of its head's heat map
    Positions own = Positions::identity();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 8 * h + quad_index();
        positions[h] = rows.position(row);
        grads[h] = arguments.grad;
        if (row >= rows.count) continue;
        const int64_t index = rows.head_token(row);
        logarithms[h] = arguments.lse[index] * kLog2E;
        if (arguments.heatmap()) {
            weights[h] = arguments.weights[rows.token_begin + rows.token(row)];
            if (weights[h] == 0.0f) positions[h] = -1;
            grads[h] += input.head_index(block.response, keys.token_begin, key_head * group + row % group, input.keys);
        } else {
            grads[h] += index * num_segments;
            const float* masses = arguments.mass + index * num_segments;
            for (int g = quad_place(); g < num_segments; g += 4) {
                // A mass of zero is a constant, whose gradient may be anything.
                if (masses[g] != 0.0f) means[h] += masses[g] * grads[h][g];
            }
        }
    }
    own.merge(Positions::of(positions[0]));
    own.merge(Positions::of(positions[1]));
    own = warp_reduce(own);

    copy_rows<T>(
        rows.data, input.aligned, shape, kRows,
        [&](int row) { return rows.position(block.first + row) < 0 ? -1 : rows.offset(block.first + row); },
        shared.rows);
    const unsigned char* own_rows = shared.rows + (warp_row - block.first) * shape.pitch;
    const float factor = input.scale * kLog2E;
    const int first = seen.oldest(window) / kStreamRows<T> * kStreamRows<T>;
    const int end = seen.highest < keys.count ? seen.highest + 1 : keys.count;
    const auto describe = [&](int key) {
        const int segment = keys.segment(key);
        return KeyInfo{segment < 0 ? -1 : keys.offset(key), segment};
    };
    // Calls visit(j, c, h, key, segment, probability) for this lane's scores [j][c] of a tile, which are of its row h;
    // the probability of a key that is not seen is zero.
    const auto probabilities = [&](const unsigned char* tile, const KeyInfo* infos, int first_key, auto visit) {
        Scores<T, 1> scores;
        multiply_tiles<T, 1>(own_rows, tile, shape, scores);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int column = 8 * j + 2 * quad_place() + c, segment = infos[column].segment;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float value = exp2f(scores[0][j][2 * h + c] * factor - logarithms[h]);
                    const bool visible = segment >= 0 && sees(positions[h], first_key + column, window);
                    visit(j, 2 * h + c, h, first_key + column, segment, visible ? value : 0.0f);
                }
            }
        }
    };
    if (arguments.heatmap()) {
        // Only keys that are shown have a gradient of their own.
        const auto add_means = [&](const unsigned char* tile, const KeyInfo* infos, int first_key) {
            const TileSegments segments = tile_segments<T>(infos);
            if (segments.highest < kShown || !own.reach(first_key, kStreamRows<T>, window)) return;
            probabilities(tile, infos, first_key, [&](int, int, int h, int key, int segment, float probability) {
                if (segment == kShown && probability != 0.0f) means[h] += probability * grads[h][key];
            });
        };
        stream_rows(keys.data, input.aligned, shape, shared, first, end, describe, add_means);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 8 * h + quad_index();
        means[h] = quad_sum(means[h]) * (arguments.heatmap() ? weights[h] : 1.0f);
        if (component == 0 && row < rows.count && quad_place() == 0) arguments.means[rows.head_token(row)] = means[h];
    }

    GradientSums sums = {};
    const int components = kept_components(shape, component);
    bool finite_keys = false;  // take what is not finite of a key as zero
    const auto add = [&](unsigned char* tile, const KeyInfo* infos, int first_key) {
        if (!finite_keys && !own.reach(first_key, kStreamRows<T>, window)) return;
        float slopes[kBlocks][4];
        probabilities(tile, infos, first_key, [&](int j, int c, int h, int key, int segment, float probability) {
            float slope = 0.0f;
            if (probability != 0.0f) {
                if (!arguments.heatmap()) slope = grads[h][segment];
                else if (segment == kShown) slope = grads[h][key] * weights[h];
            }
            slopes[j][c] = probability == 0.0f ? 0.0f : probability * (slope - means[h]);
        });
        if (finite_keys) clear_not_finite<T>(tile, shape);
        add_gradients<T>(slopes, tile, shape, component, components, sums);
    };
    // A slope of zero times NaN is NaN: a key that is not finite shows in queries of the block that do not see it. That
    // is rare, so keys are looked at only then.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        stream_rows(keys.data, input.aligned, shape, shared, first, end, describe, add);
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
        T* to = grad_q + rows.token(row) * arguments.grad_q.token_stride + row % group * arguments.grad_q.head_stride;
        store_gradients(sums, h, input.scale, component, input.size, to);
    }
}

template <typename T>
LaunchShape query_gradient_shape(const AttentionGradientArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kRows = block_rows(1);
    return {count_blocks(input.query_boundaries, input.batch, input.queries * input.group(), kRows), input.key_heads,
            ceil_div(input.size, kGradientComponents),
            SharedTiles<T, KeyInfo>::bytes(kRows, TileShape<T>(input.size).pitch)};
}

// ---- gradient of the keys --------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_key_gradient_kernel(const __grid_constant__ AttentionGradientArguments<T> arguments) {
    constexpr int kKeys = block_rows(1), kBlocks = kStreamRows<T> / 8;
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, num_segments = input.num_segments;
    const int key_head = static_cast<int>(blockIdx.y), component = static_cast<int>(blockIdx.z) * kGradientComponents;
    const BlockRows block = find_rows(input.key_boundaries, input.batch, input.keys, 1, kKeys, blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T> shape(input.size);
    const SharedTiles<T, RowInfo> shared(kKeys, shape.pitch);

    const int warp_key = block.first + warp_index() * 16;
    int segments[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) segments[h] = keys.segment(warp_key + 8 * h + quad_index());
    const bool counted = segments[0] >= 0 || segments[1] >= 0;
    const bool warp_counts = __any_sync(kAllLanes, counted) != 0;
    GradientSums sums = {};
    if (__syncthreads_or(counted) != 0) {
        copy_rows<T>(
            keys.data, input.aligned, shape, kKeys,
            [&](int key) { return keys.segment(block.first + key) < 0 ? -1 : keys.offset(block.first + key); },
            shared.rows);
        const auto describe = [&](int row) {
            RowInfo info = {-1, 0, -1, 0.0f, 0.0f, 0.0f};
            if (row >= rows.count) return info;
            const int64_t index = rows.head_token(row);
            info.position = rows.position(row);
            info.logarithm = arguments.lse[index] * kLog2E;
            // Without a visible key -inf, with a NaN NaN: then the slopes say all, and the query must not be read.
            info.offset = info.position < 0 || !is_finite(info.logarithm) ? -1 : rows.offset(row);
            info.mean = arguments.means[index];
            if (arguments.heatmap()) {
                info.weight = arguments.weights[rows.token_begin + rows.token(row)];
                if (info.weight == 0.0f) info.position = -1;
                const int head = key_head * group + row % group;
                info.grad = input.head_index(block.response, keys.token_begin, head, input.keys);
            } else {
                info.grad = index * num_segments;
            }
            return info;
        };
        const int components = kept_components(shape, component);
        const float factor = input.scale * kLog2E;
        const auto use = [&](const unsigned char* tile, const RowInfo* infos, int) {
            Positions seen = Positions::identity();
#pragma unroll
            for (int i = 0; i < kStreamRows<T>; i += kWarpSize) {
                seen.merge(Positions::of(infos[i + lane_index()].position));
            }
            if (!warp_counts || !warp_reduce(seen).reach(warp_key, 16, window)) return;
            Scores<T, 1> scores;
            multiply_tiles<T, 1>(shared.rows + (warp_key - block.first) * shape.pitch, tile, shape, scores);
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const RowInfo& row = infos[8 * j + 2 * quad_place() + c];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int key = warp_key + 8 * h + quad_index();
                        float slope = 0.0f;
                        if (segments[h] >= 0 && sees(row.position, key, window)) {
                            if (!arguments.heatmap()) slope = arguments.grad[row.grad + segments[h]];
                            else if (segments[h] == kShown) slope = arguments.grad[row.grad + key] * row.weight;
                            slope = exp2f(scores[0][j][2 * h + c] * factor - row.logarithm) * (slope - row.mean);
                        }
                        scores[0][j][2 * h + c] = slope;
                    }
                }
            }
            add_gradients<T>(scores[0], tile, shape, component, components, sums);
        };
        const RowRange seeing = rows_that_see(rows, block.first, kKeys, window);
        stream_rows(rows.data, input.aligned, shape, shared, seeing.first / kStreamRows<T> * kStreamRows<T>, seeing.end,
                    describe, use);
    }
    T* grad_k = arguments.grad_k.at(input.packed(), block.response, keys.token_begin, key_head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int key = warp_key + 8 * h + quad_index();
        if (key >= keys.count) continue;
        store_gradients(sums, h, input.scale, component, input.size, grad_k + key * arguments.grad_k.token_stride);
    }
}

template <typename T>
LaunchShape key_gradient_shape(const AttentionGradientArguments<T>& arguments) {
    const AttentionInput<T>& input = arguments.input;
    constexpr int kKeys = block_rows(1);
    return {count_blocks(input.key_boundaries, input.batch, input.keys, kKeys), input.key_heads,
            ceil_div(input.size, kGradientComponents),
            SharedTiles<T, RowInfo>::bytes(kKeys, TileShape<T>(input.size).pitch)};
}

}  // namespace cuda
}  // namespace vgpo
