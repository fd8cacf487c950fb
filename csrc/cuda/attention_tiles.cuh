// What the attention kernels share: queries and keys as rows, tiles of them in shared memory, the scores of a tile.
//
// A block holds a tile of rows (of queries, or of keys) and streams tiles of the others past it; scores never leave
// registers. The query heads that share a key head are rows of one tile: a key is read once for all of them and never
// repeated. Rows are copied asynchronously, a tile ahead of their use, and what there is to say of a row is read a tile
// ahead of that.
//
// Rows are counted within a response, in 32 bits; where a response begins is a 64-bit offset.
#pragma once

#include <cuda_pipeline.h>

#include "mma.cuh"

namespace vgpo {
namespace cuda {

// Eight would read a key half as often from the L2 cache; on an H200 masses took 7% longer so, gradients 1%.
constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
// Of a multiprocessor: eight warps leave a thread 255 registers, and more would send sums to memory.
constexpr int kAttentionBlocks = 8 / kAttentionWarps;

constexpr float kLn2 = 0.6931471805599453f;

// Rows of a streamed tile; and, where a warp keeps no more than scores, how many times 16 rows it holds.
template <typename T>
constexpr int kStreamRows = sizeof(T) == 2 ? 64 : 32;
template <typename T>
constexpr int kForwardTiles = sizeof(T) == 2 ? 2 : 1;

// Rows of a block whose warps hold `tiles` times 16.
constexpr __host__ __device__ int block_rows(int tiles) { return tiles * 16 * kAttentionWarps; }

// ---- input -----------------------------------------------------------------------------------------------------

// q or k: [B, H, L, d] padded, [L, H, d] packed; strides in elements.
template <typename T>
struct HeadTensor {
    T* data;
    int64_t batch_stride, head_stride, token_stride;

    // The first token of a response and head. `begin` is the token's index in a packed batch.
    __device__ T* at(bool packed, int64_t response, int64_t begin, int head) const {
        return data + (packed ? begin * token_stride : response * batch_stride) + head * head_stride;
    }
};

template <typename T>
struct AttentionInput {
    using Element = T;

    HeadTensor<const T> q, k;
    bool aligned;                     // rows are whole, aligned 16-byte vectors
    int size;                         // d
    int heads, key_heads;             // Hq, Hk
    int64_t batch;                    // B
    int64_t queries, keys;            // T and S of a padded batch, N and M of a packed one
    const int64_t* query_boundaries;  // [B + 1], or null for a padded batch
    const int64_t* key_boundaries;
    const int32_t* segments;          // [B, S] or [M]
    const int64_t* positions;         // [B, T] or [N]; null: queries are the last ones
    int num_segments;                 // G
    float scale;
    int window;                       // 0: none; at most as long as all keys
    int64_t longer;                   // by how much the caller's window is longer than all keys

    __host__ __device__ int group() const { return heads / key_heads; }
    __device__ bool packed() const { return query_boundaries != nullptr; }
    // Index of a head's first number in an array of one entry per query head and token: [B, Hq, L], packed [Hq, L].
    __device__ int64_t head_index(int64_t response, int64_t begin, int head, int64_t length) const {
        return packed() ? head * length + begin : (response * heads + head) * length;
    }
};

// Whether every row consists of whole 16-byte vectors at aligned addresses. The stride of a dimension with one entry
// leads nowhere, and may be anything.
template <typename T>
bool heads_are_aligned(const HeadTensor<const T>& tensor, int64_t size, int64_t batch, int64_t heads, int64_t tokens) {
    const auto whole = [](int64_t elements) { return elements % kVectorWidth<T> == 0; };
    return whole(size) && (batch <= 1 || whole(tensor.batch_stride)) && (heads <= 1 || whole(tensor.head_stride)) &&
           (tokens <= 1 || whole(tensor.token_stride)) && reinterpret_cast<uintptr_t>(tensor.data) % sizeof(uint4) == 0;
}

// The tokens of a response; boundaries that lie do not lead outside.
struct Span {
    int64_t begin;
    int count;
};

__device__ inline Span token_span(const int64_t* boundaries, int64_t response, int64_t tokens) {
    if (boundaries == nullptr) return {response * tokens, static_cast<int>(tokens)};
    const Layout layout{boundaries, 0, tokens, tokens};
    const int64_t begin = layout.boundary(response), end = layout.boundary(response + 1);
    return {begin, static_cast<int>(end > begin ? end - begin : 0)};
}

// ---- blocks of a batch -----------------------------------------------------------------------------------------
//
// A block has rows of one response. The host knows how many blocks that takes without the boundaries: response i of a
// packed batch owns those from floor(its first row / rows of a block) + i on, enough for its rows and at least one.

inline int64_t count_blocks(const int64_t* boundaries, int64_t batch, int64_t rows, int tile) {
    if (boundaries != nullptr) return batch == 0 ? 0 : rows / tile + batch;
    return batch * (rows < tile ? 1 : ceil_div<int64_t>(rows, tile));
}

struct BlockRows {
    int64_t response;
    int first;  // row of the response
};

// `tokens` has `rows_per_token` rows per token. All threads of a warp call this together.
__device__ inline BlockRows find_rows(const int64_t* boundaries, int64_t batch, int64_t tokens, int rows_per_token,
                                      int tile, int64_t block) {
    if (boundaries == nullptr) {
        const int64_t rows = tokens * rows_per_token, each = rows < tile ? 1 : ceil_div<int64_t>(rows, tile);
        return {block / each, static_cast<int>(block % each) * tile};
    }
    const Layout layout{boundaries, batch, tokens, tokens};
    const auto first_block = [&](int64_t response) {
        return layout.boundary(response) * rows_per_token / tile + response;
    };
    int before = 0;  // responses that begin at or before the block, but for the first
    for (int64_t other = 1 + lane_index(); other < batch; other += kWarpSize) before += first_block(other) <= block;
    const int64_t response = warp_reduce(Sum<int>{before}).value;
    const int64_t skipped = block - first_block(response);
    return {response, static_cast<int>(skipped < 0 ? 0 : skipped) * tile};
}

// ---- rows ------------------------------------------------------------------------------------------------------

// Queries of a response in `group` neighbouring heads: row r is query r / group in the head r % group of these.
template <typename T>
struct QueryRows {
    const T* data;  // of the first query and head
    int64_t token_stride, head_stride;
    const int64_t* positions;  // of the response, or null
    int count;                 // of rows
    int group;
    int key_count;
    int window;                // 0: none
    int64_t longer;            // by how much the caller's window is longer than all keys
    int tokens;                // without positions these are the last of the keys
    int64_t token_begin;       // flat index of the first query
    int64_t head_begin;        // index of the first query and head in arrays of one entry per head and query
    int64_t head_length;       // distance of heads there

    unsigned reciprocal;       // 2^32 / group, rounded down or one less

    // row / group: what the product says, or one more.
    __device__ int token(int row) const {
        const int found = static_cast<int>(static_cast<uint64_t>(row) * reciprocal >> 32);
        return row - found * group < group ? found : found + 1;
    }
    // row % group
    __device__ int head(int row) const { return row - token(row) * group; }
    __device__ int64_t offset(int row) const { return token(row) * token_stride + head(row) * head_stride; }
    __device__ int64_t head_token(int row) const { return head_begin + head(row) * head_length + token(row); }
    // The position of the first query, where there are no positions.
    __device__ int first_position() const { return key_count - tokens; }
    // -1: sees nothing, or is no row at all.
    __device__ int position(int row) const {
        if (row >= count) return -1;
        const int64_t given = positions == nullptr ? first_position() + token(row) : positions[token(row)];
        if (given < key_count) return static_cast<int>(given < -1 ? -1 : given);
        // Behind the last key: the nearest position there that sees the same keys, which fits into 32 bits.
        if (window == 0) return key_count - 1;
        const int64_t oldest = given - longer - window + 1;
        return static_cast<int>(oldest < 0 ? 0 : (oldest > key_count ? key_count : oldest)) + window - 1;
    }
};

template <typename T>
struct KeyRows {
    const T* data;  // of the first key
    int64_t token_stride;
    const int32_t* segments;
    int count;
    int num_segments;
    int64_t token_begin;

    __device__ int64_t offset(int key) const { return key * token_stride; }
    // -1: ignored, or no key at all.
    __device__ int segment(int key) const {
        const int value = key < count ? segments[key] : -1;
        return value >= 0 && value < num_segments ? value : -1;
    }
};

template <typename T>
__device__ KeyRows<T> key_rows(const AttentionInput<T>& input, int64_t response, int key_head) {
    const Span span = token_span(input.key_boundaries, response, input.keys);
    return {input.k.at(input.packed(), response, span.begin, key_head), input.k.token_stride,
            input.segments + span.begin, span.count, input.num_segments, span.begin};
}

// Rows of the heads [head, head + group).
template <typename T>
__device__ QueryRows<T> query_rows(const AttentionInput<T>& input, int64_t response, int key_count, int head,
                                   int group) {
    const Span span = token_span(input.query_boundaries, response, input.queries);
    return {input.q.at(input.packed(), response, span.begin, head),
            input.q.token_stride,
            input.q.head_stride,
            input.positions == nullptr ? nullptr : input.positions + span.begin,
            span.count * group,
            group,
            key_count,
            input.window,
            input.longer,
            span.count,
            span.begin,
            input.head_index(response, span.begin, head, input.queries),
            input.queries,
            UINT32_MAX / static_cast<unsigned>(group)};
}

__device__ __forceinline__ bool sees(int position, int key, int window) {
    return position >= key && (window == 0 || position - key < window);
}

// ---- tiles -----------------------------------------------------------------------------------------------------

// The shape of every tile in shared memory. kSize: d, where it is known when a kernel is compiled and every row is
// aligned; else 0. kBoxes: a streamed tile in boxes, as hopper.cuh describes them, one after the other.
template <typename T, int kSize, bool kBoxes = false>
struct TileShape {
    int components;

    __host__ __device__ explicit TileShape(int size) : components(size) {}
    __host__ __device__ int size() const { return kSize == 0 ? components : kSize; }
    __host__ __device__ int padded() const { return ceil_div(size(), 16) * 16; }
    // Bytes from row to row.
    __host__ __device__ int pitch() const { return kBoxes ? 128 : padded() * static_cast<int>(sizeof(T)) + 16; }
    // Where a vector of a row lies.
    __device__ int place(int row, int vector) const {
        if constexpr (kBoxes) return (vector / 8 * kStreamRows<T> + row) * 128 + (vector ^ row) % 8 * 16;
        return row * pitch() + vector * static_cast<int>(sizeof(uint4));
    }
    // Of a product over all components.
    __host__ __device__ int steps() const { return padded() / kStepSize<T>; }
    __device__ int vectors() const { return steps() * kStepBytes / static_cast<int>(sizeof(uint4)); }
};

// In place of a row's offset: a row of zeros. It is a whole number of vectors: an address made of it is aligned, too.
constexpr int64_t kNoRow = -16;

// Starts to copy a vector, or zeros.
__device__ __forceinline__ void copy_vector(void* to, const void* from, bool given) {
#ifdef VGPO_EMULATION
    if (given) __pipeline_memcpy_async(to, from, sizeof(uint4));
    else *static_cast<uint4*>(to) = uint4{};
#else
    asm volatile(
        "{\n"
        ".reg .pred given;\n"
        "setp.ne.s32 given, %2, 0;\n"
        "@given cp.async.cg.shared.global [%0], [%1], 16;\n"
        "@!given st.shared.v4.u32 [%0], {%3, %3, %3, %3};\n"
        "}" ::"r"(shared_address(to)), "l"(from), "r"(static_cast<int>(given)), "r"(0)
        : "memory");
#endif
}

// Starts to copy kCount rows to a tile: row i from offset(i) of `source`, zeros where that is negative and behind the
// last component. The rows are there after wait_for_copies() and a barrier. kZeros: whether rows of zeros are among them.
template <int kCount, bool kZeros, typename T, int kSize, bool kBoxes, typename Offset>
__device__ __forceinline__ void copy_rows(const T* source, bool aligned, const TileShape<T, kSize, kBoxes>& shape,
                                          Offset offset, unsigned char* tile) {
    const int thread = static_cast<int>(threadIdx.x);
    // Neighbouring lanes take neighbouring vectors.
    if constexpr (kSize != 0) {
        constexpr int kVectors = kSize / kVectorWidth<T>, kRowsAtOnce = kAttentionThreads / kVectors;
        static_assert(kAttentionThreads % kVectors == 0 && kCount % kRowsAtOnce == 0, "every thread copies as much");
        const int first = thread / kVectors, vector = thread % kVectors;
        const T* from = source + vector * kVectorWidth<T>;
        unsigned char* to = tile + shape.place(first, vector);
#pragma unroll
        for (int row = 0; row < kCount; row += kRowsAtOnce) {
            const int64_t begin = offset(row + first);
            if constexpr (kZeros) copy_vector(to + row * shape.pitch(), from + begin, begin >= 0);
            else __pipeline_memcpy_async(to + row * shape.pitch(), from + begin, sizeof(uint4));
        }
    } else {
        // As many lanes per row as it has vectors: a power of two.
        int lanes = 1, shift = 0;
        while (lanes < shape.vectors() && lanes < kWarpSize) {
            lanes *= 2;
            ++shift;
        }
        const int own = thread & (lanes - 1), rows_at_once = kAttentionThreads >> shift;
        for (int row = thread >> shift; row < kCount; row += rows_at_once) {
            const int64_t begin = offset(row);
            for (int vector = own; vector < shape.vectors(); vector += lanes) {
                const int first = vector * kVectorWidth<T>;
                unsigned char* to = tile + row * shape.pitch() + vector * static_cast<int>(sizeof(uint4));
                const bool inside = begin >= 0 && first < shape.size();
                if (aligned) {
                    copy_vector(to, source + (inside ? begin + first : 0), inside);
                } else {
                    uint4 values = {};
                    if (inside) values = load_vector<false>(source + begin, first, shape.size());
                    *reinterpret_cast<uint4*>(to) = values;
                }
            }
        }
    }
    __pipeline_commit();
}

// The same for rows that lie `stride` apart, and are aligned.
template <int kCount, typename T, int kSize, bool kBoxes>
__device__ __forceinline__ void copy_even_rows(const T* source, const TileShape<T, kSize, kBoxes>& shape,
                                               int64_t stride, unsigned char* tile) {
    constexpr int kVectors = kSize / kVectorWidth<T>, kRowsAtOnce = kAttentionThreads / kVectors;
    const int thread = static_cast<int>(threadIdx.x), first = thread / kVectors, vector = thread % kVectors;
    const T* from = source + first * stride + vector * kVectorWidth<T>;
    unsigned char* to = tile + shape.place(first, vector);
#pragma unroll
    for (int row = 0; row < kCount; row += kRowsAtOnce) {
        __pipeline_memcpy_async(to + row * shape.pitch(), from, sizeof(uint4));
        from += kRowsAtOnce * stride;
    }
    __pipeline_commit();
}

// For the copies that this thread has started.
__device__ __forceinline__ void wait_for_copies() { __pipeline_wait_prior(0); }

// What is said of a streamed row, besides its components.
struct KeyInfo {
    int64_t offset;  // of its components, or kNoRow
    int segment;     // -1: ignored
};

struct alignas(16) RowInfo {
    int64_t offset;   // of its components, or kNoRow
    int64_t grad;     // index of its first gradient
    float logarithm;  // of its sum of exponentials, base 2
    float weight;     // in a heat map; of masses, the gradient of the one segment of a block's keys less `mean`
    float mean;       // <p, g>
    int position;     // -1: sees nothing

    __device__ static RowInfo none() { return {kNoRow, 0, 0.0f, 0.0f, 0.0f, -1}; }
};

constexpr int kInfoTiles = 3;

// Shared memory of a block: its own rows, streamed tiles, and what is said of them.
template <typename T, typename Info>
struct SharedTiles {
    unsigned char* rows;
    unsigned char* streamed;
    Info* infos;

    static constexpr int bytes(int block_rows, int pitch) {
        return (block_rows + 2 * kStreamRows<T>) * pitch + kInfoTiles * kStreamRows<T> * static_cast<int>(sizeof(Info));
    }

    __device__ SharedTiles(int block_rows, int pitch) {
        rows = dynamic_shared_memory();
        streamed = rows + block_rows * pitch;
        infos = reinterpret_cast<Info*>(streamed + 2 * kStreamRows<T> * pitch);
    }

    // Of the block's own rows, in the place of the first streamed tiles, until these are copied.
    __device__ int64_t* own_offsets() const { return reinterpret_cast<int64_t*>(streamed); }
};

// Whether products take a number as finite. Of a float they take TF32, to which the largest floats are infinite.
template <typename T>
__device__ bool finite_in_products(float value) {
    if constexpr (sizeof(T) == sizeof(float)) value = __uint_as_float(round_to_tf32(value));
    return is_finite(value);
}

// Puts zeros in place of what is not finite in a streamed tile. All threads of the block call this together.
template <typename T, int kSize>
__device__ void clear_not_finite(unsigned char* tile, const TileShape<T, kSize>& shape) {
    __syncthreads();  // others may still read the tile
    const int vectors = shape.vectors();
    for (int i = static_cast<int>(threadIdx.x); i < kStreamRows<T> * vectors; i += kAttentionThreads) {
        T* numbers = reinterpret_cast<T*>(tile + i / vectors * shape.pitch()) + i % vectors * kVectorWidth<T>;
        float values[kVectorWidth<T>];
        unpack(*reinterpret_cast<const uint4*>(numbers), numbers, values);
        for (int j = 0; j < kVectorWidth<T>; ++j) {
            if (!finite_in_products<T>(values[j])) store_float(numbers + j, 0.0f);
        }
    }
    __syncthreads();
}

// Streams rows [first, end) past the block, `first` being a multiple of a tile's rows. describe(row) says what there is
// to say of a row, arrived() is called when the block's own rows are there, and use(tile, infos, first) with each tile.
// kEven: row i of those that are not zeros begins at i * stride.
template <bool kEven, typename T, int kSize, typename Info, typename Describe, typename Arrived, typename Use>
__device__ __forceinline__ void stream_rows(const T* source, bool aligned, const TileShape<T, kSize>& shape,
                                            const SharedTiles<T, Info>& shared, int first, int end, int64_t stride,
                                            Describe describe, Arrived arrived, Use use) {
    constexpr int kRows = kStreamRows<T>;
    if (first >= end) {
        wait_for_copies();  // of the block's own rows
        return;
    }
    const int thread = static_cast<int>(threadIdx.x);
    const auto copy = [&](int tile, const Info* infos) {
        unsigned char* to = shared.streamed + tile % 2 * kRows * shape.pitch();
        if constexpr (kSize != 0) {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < kRows; i += kWarpSize) complete &= infos[i + lane_index()].offset >= 0;
            if (__all_sync(kAllLanes, complete) != 0) {
                if constexpr (kEven) copy_even_rows<kRows>(source + (first + tile * kRows) * stride, shape, stride, to);
                else copy_rows<kRows, false>(source, aligned, shape, [&](int row) { return infos[row].offset; }, to);
                return;
            }
        }
        copy_rows<kRows, true>(source, aligned, shape, [&](int row) { return infos[row].offset; }, to);
    };
    const int tiles = ceil_div(end - first, kRows);
    __syncthreads();  // the last tile of an earlier stream may still be in use
    for (int tile = 0; tile < 2 && thread < kRows; ++tile) {
        shared.infos[tile * kRows + thread] = describe(first + tile * kRows + thread);
    }
    __syncthreads();
    copy(0, shared.infos);
    wait_for_copies();
    __syncthreads();
    arrived();
    for (int tile = 0;; ++tile) {
        if (tile + 1 < tiles) copy(tile + 1, shared.infos + (tile + 1) % kInfoTiles * kRows);
        // Other warps in turn describe rows, so that no part of a multiprocessor has more to do than another.
        const int described = (thread + tile * kRows) % kAttentionThreads;
        Info after_next = {};
        const bool describes = tile + 2 < tiles && described < kRows;
        if (describes) after_next = describe(first + (tile + 2) * kRows + described);
        use(shared.streamed + tile % 2 * kRows * shape.pitch(), shared.infos + tile % kInfoTiles * kRows,
            first + tile * kRows);
        if (tile + 1 == tiles) break;
        if (describes) shared.infos[(tile + 2) % kInfoTiles * kRows + described] = after_next;
        wait_for_copies();
        // The next tile has arrived, and everyone is done with this one, whose place the one after it takes.
        __syncthreads();
    }
}

// How a kernel is launched: blocks along the rows, a head each, and parts of the result that no block keeps together.
struct LaunchShape {
    int64_t blocks;
    int heads, parts;
    int shared_bytes;
};

// Scores, unscaled: 16 kTiles rows of this warp by a streamed tile.
template <typename T, int kTiles>
using Scores = float[kTiles][kStreamRows<T> / 8][4];

// The rows of a warp, 16 kTiles, as left operands of products: loaded once where registers are enough, else for every
// tile.
template <typename T, int kSize, int kTiles>
class OwnRows {
   public:
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    // There the compiler needs more registers for the gradients, which have one tile of rows.
    static constexpr bool kKept = kSize != 0 && sizeof(T) == 2 && kTiles > 1;
#else
    static constexpr bool kKept = kSize != 0 && sizeof(T) == 2;
#endif

    // `rows` are in shared memory when arrived() is called. `signs`: as in load_left.
    __device__ OwnRows(const unsigned char* rows, const TileShape<T, kSize>& shape, unsigned signs)
        : rows_(rows), shape_(shape), signs_(signs) {}

    __device__ __forceinline__ void arrived() {
        if constexpr (kKept) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) load(kept_[step], step);
        }
    }
    __device__ __forceinline__ void get(Left<T> (&left)[kTiles], int step) const {
        if constexpr (kKept) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) left[i] = kept_[step][i];
        } else {
            load(left, step);
        }
    }

   private:
    static constexpr int kSteps = kKept ? kSize / kStepSize<T> : 1;

    __device__ __forceinline__ void load(Left<T> (&left)[kTiles], int step) const {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            load_left<T>(left[i], rows_ + i * 16 * shape_.pitch(), shape_.pitch(), step, signs_);
        }
    }

    const unsigned char* rows_;
    TileShape<T, kSize> shape_;
    unsigned signs_;
    Left<T> kept_[kSteps][kTiles];
};

template <typename T, int kSize, int kTiles>
__device__ __forceinline__ void multiply_tiles(const OwnRows<T, kSize, kTiles>& own, const unsigned char* streamed,
                                               const TileShape<T, kSize>& shape, Scores<T, kTiles>& scores) {
    constexpr int kBlocks = kStreamRows<T> / 8;
    [[maybe_unused]] constexpr int kUnroll = kSize == 0 ? 2 : kSize / kStepSize<T>;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) scores[i][j][c] = 0.0f;
        }
    }
#pragma unroll kUnroll
    for (int step = 0; step < shape.steps(); ++step) {
        Left<T> left[kTiles];
        own.get(left, step);
#pragma unroll
        for (int j = 0; j < kBlocks; j += 2) {
            Right<T> right[2];
            load_right<T>(right, streamed + j * 8 * shape.pitch(), shape.pitch(), step);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                multiply_add<T>(scores[i][j], left[i], right[0]);
                multiply_add<T>(scores[i][j + 1], left[i], right[1]);
            }
        }
    }
}

// ---- reductions ------------------------------------------------------------------------------------------------

// Over the four lanes that share a row of scores.
__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
    return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// The positions that a set of rows spans, those that see nothing left out.
struct Positions {
    int lowest, highest;

    __device__ static Positions identity() { return {INT32_MAX, -1}; }
    __device__ static Positions of(int position) { return {position < 0 ? INT32_MAX : position, position}; }
    __device__ void merge(const Positions& other) {
        lowest = lowest < other.lowest ? lowest : other.lowest;
        highest = highest > other.highest ? highest : other.highest;
    }
    // Whether any key of [first, first + count) may be seen.
    __device__ bool reach(int first, int count, int window) const {
        return highest >= first && (window == 0 || lowest - window < first + count - 1);
    }
    // Whether every key of [first, first + count) is seen, by rows that all see something.
    __device__ bool cover(int first, int count, int window) const {
        return lowest >= first + count - 1 && (window == 0 || highest - first < window);
    }
    // The first key that may be seen.
    __device__ int oldest(int window) const {
        return window == 0 || lowest == INT32_MAX || lowest < window ? 0 : lowest - window + 1;
    }
};

// Lists where the rows of a block are, and returns the positions of all. All threads of the block call this together,
// and the list is there when it returns.
template <int kRows, typename T>
__device__ Positions list_rows(const QueryRows<T>& rows, int first, int64_t* offsets) {
    const int thread = static_cast<int>(threadIdx.x);
    Positions seen = Positions::identity();
    if (thread < kRows) {
        const int position = rows.position(first + thread);
        offsets[thread] = position < 0 ? kNoRow : rows.offset(first + thread);
        seen = Positions::of(position);
    }
    return block_reduce(seen);
}

}  // namespace cuda
}  // namespace vgpo
