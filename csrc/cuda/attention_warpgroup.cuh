// Attention by segment with Hopper's products of a warpgroup: what attention_mass.cuh does of 16-bit heads of 64 or 128.
//
// Rows, tiles, masks and sums are those of attention_mass_kernel; only products differ, and when they run. A warp's 32
// rows are two times 16, and the block's two products, of 64 rows by 64 keys, take turns: while the tensor cores compute
// one, the block makes exponentials of the other. Queries stay in registers as left operands. Keys lie in boxes, copied
// a tile ahead of their use; a tile takes one barrier of the block. Results have the other kernel's bits where the
// tensor cores add 16 components alike in both kinds of products, and else differ by their rounding.
//
// Prediction for an H200, where attention_mass_kernel takes 0.55 ms at B = 4, 28 query and 4 key heads of 128, 2,048
// queries of 3,072 keys: 470 million exponentials are 0.13 ms of the special function units, 120 GFLOP at the measured
// 790 TFLOP/s are 0.15 ms, 560 instructions a warp and tile of which 64 are exponentials 0.14 ms of the schedulers. All
// three can run at once: 0.25 to 0.35 ms. Not measured.
#pragma once

#include "attention_mass.cuh"
#include "hopper.cuh"

namespace vgpo {
namespace cuda {

// Tiles of keys: the one whose scores are at hand, the next, which products read already, and one that copies write.
constexpr int kBoxBuffers = 3;
// Tiles of which something is said: of those, and of the one before, which slower warps may still look at.
constexpr int kBoxInfos = 4;

// Shared memory of a block. Its own rows lie where tiles of keys but the first will be.
template <typename T, int kSize>
struct BoxTiles {
    using Shape = TileShape<T, kSize, true>;

    unsigned char *streamed, *rows;
    KeyInfo* infos;

    static constexpr int kKeys = kStreamRows<T>, kTileBytes = kKeys * kSize * static_cast<int>(sizeof(T));
    static constexpr int kRows = block_rows(kForwardTiles<T>);

    static __host__ __device__ int info_bytes() { return kBoxInfos * kKeys * static_cast<int>(sizeof(KeyInfo)); }
    static __host__ __device__ int row_bytes() {
        const int own = kRows * TileShape<T, kSize>(kSize).pitch(), others = (kBoxBuffers - 1) * kTileBytes;
        return own > others ? own : others;
    }
    static int bytes() { return kBoxAlignment + kTileBytes + row_bytes() + info_bytes(); }

#ifdef VGPO_HAS_WARPGROUPS
    __device__ BoxTiles() {
        streamed = first_box();
        rows = streamed + kTileBytes;
        infos = reinterpret_cast<KeyInfo*>(rows + row_bytes());
    }
#endif
    __device__ unsigned char* tile(int index) const { return streamed + index % kBoxBuffers * kTileBytes; }
    __device__ KeyInfo* infos_of(int tile) const { return infos + tile % kBoxInfos * kKeys; }
    // Of the block's own rows, where something is said of the third tile later.
    __device__ int64_t* own_offsets() const { return reinterpret_cast<int64_t*>(infos_of(2)); }
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_warpgroup_kernel(const __grid_constant__ AttentionMassArguments<T> arguments) {
#ifdef VGPO_HAS_WARPGROUPS
    using Shared = BoxTiles<T, kSize>;
    constexpr int kTiles = kForwardTiles<T>, kRows = Shared::kRows, kKeys = Shared::kKeys;
    static_assert(kAttentionThreads == kWarpgroupThreads && kTiles == 2 && kKeys == 8 * kNarrowBlocks);
    static_assert(kAttentionThreads == 2 * kKeys, "threads describe two tiles at first");
    static_assert(kRows * sizeof(int64_t) <= 2 * kKeys * sizeof(KeyInfo), "a place for offsets");
    const AttentionInput<T>& input = arguments.input;
    const int group = input.group(), window = input.window, key_head = static_cast<int>(blockIdx.y);
    const int first_segment = static_cast<int>(blockIdx.z) * kBlockSegments;
    const BlockRows block = find_rows(input.query_boundaries, input.batch, input.queries, group, kRows,
                                      gridDim.x - 1 - blockIdx.x);
    const KeyRows<T> keys = key_rows(input, block.response, key_head);
    const QueryRows<T> rows = query_rows(input, block.response, keys.count, key_head * group, group);
    const TileShape<T, kSize> row_shape(kSize);
    const typename Shared::Shape key_shape(kSize);
    const Shared shared;
    const int thread = static_cast<int>(threadIdx.x);

    const Positions seen = list_rows<kRows>(rows, block.first, shared.own_offsets());
    const int warp_row = block.first + warp_index() * 16 * kTiles;
    const WarpView<1> views[kTiles] = {{rows, warp_row}, {rows, warp_row + 16}};
    const float factor = softmax_factor(input.scale);
    StreamingSoftmax<T, 1> softmax[kTiles] = {{first_segment, factor}, {first_segment, factor}};
    const int last_key = seen.highest < keys.count ? seen.highest + 1 : keys.count;
    const int first_key = seen.oldest(window) / kKeys * kKeys;
    // Known to be the same in every lane.
    const int tiles = static_cast<int>(
        __reduce_max_sync(kAllLanes, first_key < last_key ? ceil_div(last_key - first_key, kKeys) : 0u));

    if (tiles > 0) {
        const auto describe = [&](int key) {
            const int segment = keys.segment(key);
            return KeyInfo{segment < 0 ? kNoRow : keys.offset(key), segment};
        };
        const auto copy = [&](int tile) {
            const KeyInfo* infos = shared.infos_of(tile);
            bool complete = true;
#pragma unroll
            for (int i = 0; i < kKeys; i += kWarpSize) complete &= infos[i + lane_index()].offset >= 0;
            if (__all_sync(kAllLanes, complete) != 0) {
                const T* from = keys.data + (first_key + tile * kKeys) * keys.token_stride;
                copy_even_rows<kKeys>(from, key_shape, keys.token_stride, shared.tile(tile));
            } else {
                copy_rows<kKeys, true>(
                    keys.data, true, key_shape, [&](int row) { return infos[row].offset; }, shared.tile(tile));
            }
        };
        const auto receive = [&] {
            wait_for_copies();
            publish_writes();
            __syncthreads();
        };

        copy_rows<kRows, true>(
            rows.data, true, row_shape, [&](int row) { return shared.own_offsets()[row]; }, shared.rows);
        shared.infos[thread] = describe(first_key + thread);  // of two tiles
        __syncthreads();
        copy(0);
        receive();
        // The largest score is found before scores are scaled, so a negative scale changes the queries' signs.
        OwnRows<T, kSize, kTiles> own_rows(shared.rows + warp_index() * 16 * kTiles * row_shape.pitch(), row_shape,
                                           input.scale < 0.0f ? kSigns<T> : 0u);
        static_assert(own_rows.kKept);
        own_rows.arrived();
        __syncthreads();  // others may still read their rows
        if (tiles > 1) copy(1);

        Scores<T, 1> scores[kTiles];
        const auto multiply = [&](auto half, int tile) {
            constexpr int kHalf = decltype(half)::value;
            const uint64_t right = operand_of(shared.tile(tile));
            constexpr int kBoxSteps = kBoxBytes / kStepBytes;
            begin_products();
#pragma unroll
            for (int step = 0; step < kSize / kStepSize<T>; ++step) {
                Left<T> left[kTiles];
                own_rows.get(left, step);
                const int box = step / kBoxSteps * (kKeys * kBoxBytes / 16);
                multiply_group(scores[kHalf][0], left[kHalf].words, right + box + step % kBoxSteps * kOperandStep,
                               step > 0, static_cast<const T*>(nullptr));
            }
            end_products();
        };
        const auto add = [&](auto half, int tile, const TileSegments& segments) {
            constexpr int kHalf = decltype(half)::value;
            take_sums(scores[kHalf][0]);
            const int key = first_key + tile * kKeys;
            if (!views[kHalf].all.reach(key, kKeys, window)) return;
            add_tile(softmax[kHalf], scores[kHalf], views[kHalf], segments, shared.infos_of(tile), key, window);
        };
        constexpr std::integral_constant<int, 0> kUpper;
        constexpr std::integral_constant<int, 1> kLower;
        multiply(kUpper, 0);
        for (int tile = 0; tile < tiles; ++tile) {
            // Other warps in turn describe keys, so that no part of a multiprocessor has more to do than another.
            const int described = (thread + tile * kKeys) % kAttentionThreads;
            const bool describes = tile + 2 < tiles && described < kKeys;
            KeyInfo after_next = {};
            if (describes) after_next = describe(first_key + (tile + 2) * kKeys + described);
            wait_for_products<0>();
            multiply(kLower, tile);
            const TileSegments segments = tile_segments<T>(shared.infos_of(tile));
            add(kUpper, tile, segments);
            if (describes) shared.infos_of(tile + 2)[described] = after_next;
            // The next tile has arrived, and everyone is done with the one before this, whose place another takes.
            receive();
            if (tile + 2 < tiles) copy(tile + 2);
            wait_for_products<0>();
            multiply(kUpper, tile + 1);  // behind the last tile of numbers that nobody uses
            add(kLower, tile, segments);
        }
        wait_for_products<0>();
    }
#pragma unroll
    for (int half = 0; half < kTiles; ++half) {
        softmax[half].end_run(-1);
        store_masses(softmax[half], rows, warp_row + 16 * half, arguments);
    }
#endif
}

}  // namespace cuda
}  // namespace vgpo
