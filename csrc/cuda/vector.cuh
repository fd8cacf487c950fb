// Rows of hidden states as 16-byte vectors.
//
// A row is read in vectors of 16 bytes, vector v by lane v % 32. A row that is not aligned, or whose length is no
// multiple of a vector, is read element by element into the same vectors: slower, and bit for bit the same result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace vgpo {
namespace cuda {

template <typename T>
constexpr int kVectorWidth = static_cast<int>(sizeof(uint4) / sizeof(T));  // elements of a 16-byte vector

template <typename T>
constexpr int kWarpColumns = kWarpSize * kVectorWidth<T>;  // columns that a warp covers with one vector per lane

// Columns [column, column + width) of a row of `dim` columns; zero beyond the end. Read once: evict first.
template <bool kAligned, typename T>
__device__ __forceinline__ uint4 load_vector(const T* row, int column, int dim) {
    if constexpr (kAligned) {
        return __ldcs(reinterpret_cast<const uint4*>(row + column));
    } else {
        using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
        const Bits* bits = reinterpret_cast<const Bits*>(row);
        Bits elements[kVectorWidth<T>];
#pragma unroll
        for (int i = 0; i < kVectorWidth<T>; ++i) elements[i] = column + i < dim ? bits[column + i] : Bits(0);
        uint4 vector;
        memcpy(&vector, elements, sizeof vector);
        return vector;
    }
}

__device__ __forceinline__ void unpack(uint4 vector, const float*, float (&values)[4]) {
    values[0] = __uint_as_float(vector.x);
    values[1] = __uint_as_float(vector.y);
    values[2] = __uint_as_float(vector.z);
    values[3] = __uint_as_float(vector.w);
}

__device__ __forceinline__ void unpack(uint4 vector, const __nv_bfloat16*, float (&values)[8]) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void unpack(uint4 vector, const __half*, float (&values)[8]) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __half2 pair;
        memcpy(&pair, &words[i], sizeof pair);
        const float2 both = __half22float2(pair);
        values[2 * i] = both.x;
        values[2 * i + 1] = both.y;
    }
}

// Two floats rounded to 16-bit numbers, the first in the lower half of the word.
__device__ __forceinline__ unsigned pack(float first, float second, const __nv_bfloat16*) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
}
__device__ __forceinline__ unsigned pack(float first, float second, const __half*) {
    const __half2 pair = __floats2half2_rn(first, second);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

// Stores a float, rounded to T.
__device__ __forceinline__ void store_float(float* to, float value) { *to = value; }
template <typename T>
__device__ __forceinline__ void store_float(T* to, float value) {
    const unsigned word = pack(value, 0.0f, to);
    T number;  // copied into `to` itself, whose alignment memcpy ignores, it would be stored byte by byte
    memcpy(&number, &word, sizeof number);
    *to = number;
}

// kWidth floats from column `column` of a row of fp32, zero beyond the end. Written by this kernel's other blocks,
// perhaps: an ordinary load.
template <bool kAligned, int kWidth>
__device__ __forceinline__ void load_floats(const float* row, int column, int dim, float (&values)[kWidth]) {
    if constexpr (kAligned) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(row + column + i);
            values[i] = four.x;
            values[i + 1] = four.y;
            values[i + 2] = four.z;
            values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] = column + i < dim ? row[column + i] : 0.0f;
    }
}

template <bool kAligned, int kWidth>
__device__ __forceinline__ void store_floats(float* row, int column, int dim, const float (&values)[kWidth]) {
    if constexpr (kAligned) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            *reinterpret_cast<float4*>(row + column + i) =
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (column + i < dim) row[column + i] = values[i];
        }
    }
}

// Whether every row, and every given prototype, consists of whole 16-byte vectors at aligned addresses. The stride of a
// dimension of size 1 may be any number and takes nobody anywhere.
template <typename T>
bool rows_are_aligned(const T* hidden, const HiddenStrides& strides, const Layout& layout, int64_t dim,
                      const float* prototypes) {
    const auto whole = [](int64_t elements) { return elements % kVectorWidth<T> == 0; };
    const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0; };
    const bool batches = layout.cu_seqlens != nullptr || layout.batch <= 1 || whole(strides.batch);
    return batches && (layout.rows <= 1 || whole(strides.row)) && whole(dim) && aligned(hidden) && aligned(prototypes);
}

// Asks for memory ahead of its use, so that it stays busy while the grid waits for its slowest block. A warp calls it;
// what is no whole 16 bytes at either end may be left out.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* begin, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__)
    constexpr uint64_t kUnit = 16;
    const auto address = static_cast<uint64_t>(__cvta_generic_to_global(begin));
    const uint64_t first = (address + kUnit - 1) / kUnit * kUnit, last = (address + bytes) / kUnit * kUnit;
    if (first >= last) return;
#if __CUDA_ARCH__ >= 900
    if (lane_index() > 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(static_cast<unsigned>(last - first))
                 : "memory");
#else
    constexpr uint64_t kLine = 128;
    for (uint64_t line = first + lane_index() * kLine; line < last; line += kWarpSize * kLine) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
#endif
#endif
}

template <typename T>
__device__ __forceinline__ void prefetch_row(const T* row, int dim) {
    prefetch(row, dim * static_cast<int>(sizeof(T)));
}

// Asks for an array of an entry per token, which may be null: a piece a warp of the grid, so that of more than a million
// tokens only the first come early. The last warps begin, because the first blocks make the lists of rows.
__device__ inline void prefetch_tokens(const float* values, int64_t tokens) {
    constexpr int kPiece = 512;
    const int64_t first = static_cast<int64_t>(grid_warps() - 1 - grid_warp()) * kPiece;
    if (values == nullptr || first >= tokens) return;
    const int64_t left = tokens - first;
    prefetch(values + first, static_cast<int>(left < kPiece ? left : kPiece) * static_cast<int>(sizeof(float)));
}

}  // namespace cuda
}  // namespace vgpo
