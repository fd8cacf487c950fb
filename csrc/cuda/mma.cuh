// Matrix products on the tensor cores, one warp at a time.
//
// A step multiplies 16 rows by 8 columns over 32 bytes of components: 16 of a half-precision type, or 8 floats. Seen as
// 32-bit words all element types lie alike, in shared memory and in registers. Lane 4 g + t (in quad g, at place t)
// holds of the sums those of rows g and g + 8 in columns 2 t and 2 t + 1.
//
// Floats: the tensor cores multiply TF32 numbers, which have 11 bits, and a float is the sum of two of those. Three of
// the four products of parts are added up; the fourth lies below the last bit of fp32. That is fp32's accuracy at a
// third of TF32's rate.
#pragma once

#include "vector.cuh"

namespace vgpo {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

__device__ inline int quad_index() { return lane_index() / 4; }
__device__ inline int quad_place() { return lane_index() % 4; }

// ---- instructions ----------------------------------------------------------------------------------------------

#ifndef VGPO_EMULATION

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four matrices of 8 rows of 16 bytes in shared memory: lane i has the address of row i % 8 of matrix i / 8. Each lane
// gets word t of row g of each.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same matrices as columns: of 16-bit elements, a lane gets those of rows 2 t and 2 t + 1 in column g.
__device__ __forceinline__ void load_transposed_matrices(unsigned (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define VGPO_MMA(shape_and_types)                                                                               \
    asm volatile("mma.sync.aligned." shape_and_types                                                            \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                   \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]))

__device__ __forceinline__ void add_products(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2],
                                             const __nv_bfloat16*) {
    VGPO_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ __forceinline__ void add_products(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2],
                                             const __half*) {
    VGPO_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
// Of TF32 numbers.
__device__ __forceinline__ void add_products(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2],
                                             const float*) {
    VGPO_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef VGPO_MMA

__device__ __forceinline__ unsigned round_to_tf32(float value) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
}

// 2^value, in one instruction: what would be subnormal is zero, in place of a comparison and two products.
__device__ __forceinline__ float power_of_two(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

#else
using emulation::add_products;
using emulation::load_matrices;
using emulation::load_transposed_matrices;
using emulation::round_to_tf32;

inline float power_of_two(float value) { return exp2f(value); }
#endif

// ---- operands --------------------------------------------------------------------------------------------------

constexpr int kStepBytes = 32;

template <typename T>
constexpr int kStepSize = kStepBytes / static_cast<int>(sizeof(T));  // components of a step

// Words of an operand, in two parts if T is float.
template <typename T, int kWords>
struct Operand {
    unsigned words[kWords];

    __device__ __forceinline__ void set(int i, unsigned word) { words[i] = word; }
};

template <int kWords>
struct Operand<float, kWords> {
    unsigned words[kWords], rest[kWords];

    __device__ __forceinline__ void set(int i, unsigned word) {
        words[i] = round_to_tf32(__uint_as_float(word));
        rest[i] = round_to_tf32(__uint_as_float(word) - __uint_as_float(words[i]));
    }
};

template <typename T>
using Left = Operand<T, 4>;  // 16 rows
template <typename T>
using Right = Operand<T, 2>;  // 8 columns

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const Left<T>& left, const Right<T>& right) {
    const T* const type = nullptr;
    if constexpr (std::is_same_v<T, float>) {
        // The small ones first.
        add_products(sums, left.rest, right.words, type);
        add_products(sums, left.words, right.rest, type);
    }
    add_products(sums, left.words, right.words, type);
}

// A tile in shared memory consists of rows that begin `pitch` bytes after each other, an odd multiple of 16: eight rows
// then lie in different banks.

// The bits that change the sign of every number of a word.
template <typename T>
constexpr unsigned kSigns = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;

// Rows 0 to 15 of a tile, one step of their components. `signs` is zero, or kSigns to load their negatives.
template <typename T>
__device__ __forceinline__ void load_left(Left<T>& left, const unsigned char* tile, int pitch, int step,
                                          unsigned signs) {
    const int row = lane_index() % 16, half = lane_index() / 16;
    unsigned words[4];
    load_matrices(words, tile + row * pitch + step * kStepBytes + half * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) left.set(i, words[i] ^ signs);
}

// Rows 0 to 7 and 8 to 15 of a tile as columns, one step of their components.
template <typename T>
__device__ __forceinline__ void load_right(Right<T> (&right)[2], const unsigned char* tile, int pitch, int step) {
    const int row = lane_index() / 16 * 8 + lane_index() % 8, half = lane_index() / 8 % 2;
    unsigned words[4];
    load_matrices(words, tile + row * pitch + step * kStepBytes + half * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i / 2].set(i % 2, words[i]);
}

// ---- sums as the left operand of another product ---------------------------------------------------------------

// Neighbouring blocks of 8 columns of sums that make one step.
template <typename T>
constexpr int kStepBlocks = kStepSize<T> / 8;

// Of floats, the step's components are taken in the order 0, 2, 4, 6, 1, 3, 5, 7, as load_right_of_rows takes its rows:
// so no sum has to change its lane.
template <typename T>
__device__ __forceinline__ void left_of_sums(Left<T>& left, const float (*blocks)[4]) {
    if constexpr (std::is_same_v<T, float>) {
        left.set(0, __float_as_uint(blocks[0][0]));
        left.set(1, __float_as_uint(blocks[0][2]));
        left.set(2, __float_as_uint(blocks[0][1]));
        left.set(3, __float_as_uint(blocks[0][3]));
    } else {
        const T* const type = nullptr;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            left.set(2 * i, pack(blocks[i][0], blocks[i][1], type));
            left.set(2 * i + 1, pack(blocks[i][2], blocks[i][3], type));
        }
    }
}

// A step's rows of a tile (rows 0 to 15, or 0 to 7 of floats) as the components, and 16 neighbouring elements of theirs
// from `element` on as the columns.
template <typename T>
__device__ __forceinline__ void load_right_of_rows(Right<T> (&right)[2], const unsigned char* tile, int pitch,
                                                   int element) {
    if constexpr (std::is_same_v<T, float>) {
        const unsigned char* row = tile + 2 * quad_place() * pitch + (element + quad_index()) * sizeof(float);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned char* word = row + i % 2 * pitch + i / 2 * 8 * sizeof(float);
            right[i / 2].set(i % 2, *reinterpret_cast<const unsigned*>(word));
        }
    } else {
        const int row = lane_index() % 16, block = lane_index() / 16;
        unsigned words[4];
        load_transposed_matrices(words, tile + row * pitch + (element + 8 * block) * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int i = 0; i < 4; ++i) right[i / 2].set(i % 2, words[i]);
    }
}

}  // namespace cuda
}  // namespace vgpo
