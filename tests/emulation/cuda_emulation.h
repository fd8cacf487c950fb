// The CUDA language for an ordinary C++ compiler: kernels written for nvcc compile against this and run on a Machine.
//
// Kernels include <cuda_runtime.h>, <cuda.h>, <cuda_fp16.h>, <cuda_bf16.h>, <cuda_pipeline.h>, <cooperative_groups.h>:
// the directory include/ has headers of those names that lead here. Only what kernels of this project may use is given:
// there are no floating-point atomics, for example, because results must not depend on the order of additions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define VGPO_EMULATION 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local
// `extern __shared__ type name[]` cannot be expressed; kernels that emulation runs write EMULATED_DYNAMIC_SHARED.
#define EMULATED_DYNAMIC_SHARED(type, name) \
    type* name = reinterpret_cast<type*>(::emulation::machine().current().block->dynamic_shared->data())

#define threadIdx (::emulation::machine().current().thread)
#define blockIdx (::emulation::machine().current().block->index)
// No macros: a launch's configuration has members of these names.
inline const emulation::Index3& blockDim = emulation::machine().launch().block;
inline const emulation::Index3& gridDim = emulation::machine().launch().grid;
constexpr int warpSize = emulation::kWarp;

// ---- vector types ---------------------------------------------------------------------------------------------

struct dim3 : emulation::Index3 {
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : Index3{x_, y_, z_} {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- synchronisation ------------------------------------------------------------------------------------------

// Default arguments are evaluated where the call stands, so every call knows its place in the source.
#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { emulation::machine().barrier({file, line}, false); }
inline int __syncthreads_count(int predicate, EMULATION_SITE) {
    emulation::machine().barrier({file, line}, predicate != 0);
    return static_cast<int>(emulation::machine().current().result);
}
inline int __syncthreads_or(int predicate, EMULATION_SITE) { return __syncthreads_count(predicate, file, line) != 0; }
inline int __syncthreads_and(int predicate, EMULATION_SITE) {
    return __syncthreads_count(predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
    emulation::machine().warp_exchange(emulation::Exchange::kSync, mask, 0, 0, {file, line});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cooperative_groups {
struct grid_group {
    void sync(EMULATION_SITE) const { emulation::machine().grid_barrier({file, line}); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// ---- warp operations ------------------------------------------------------------------------------------------

namespace emulation {

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "what CUDA's shuffles take");
    uint64_t payload = 0;
    std::memcpy(&payload, &value, sizeof value);
    const uint64_t result = machine().warp_exchange(Exchange::kShuffle, mask, payload, source, site);
    std::memcpy(&value, &result, sizeof value);
    return value;
}

// The lane a shuffle reads, within segments of `width` lanes; its own where that lies outside the segment.
inline int own_unless(bool inside, int lane) { return inside ? lane : machine().current().lane; }

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_SITE) {
    const int lane = emulation::machine().current().lane;
    return emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATION_SITE) {
    const int lane = emulation::machine().current().lane, other = lane ^ lane_mask;
    const bool inside = other < (lane & ~(width - 1)) + width;
    return emulation::shuffle(mask, value, emulation::own_unless(inside, other), {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_SITE) {
    const int lane = emulation::machine().current().lane, other = lane + static_cast<int>(delta);
    const bool inside = other < (lane & ~(width - 1)) + width;
    return emulation::shuffle(mask, value, emulation::own_unless(inside, other), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_SITE) {
    const int lane = emulation::machine().current().lane, other = lane - static_cast<int>(delta);
    const bool inside = other >= (lane & ~(width - 1));
    return emulation::shuffle(mask, value, emulation::own_unless(inside, other), {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
    return static_cast<unsigned>(emulation::machine().warp_exchange(emulation::Exchange::kBallot, mask,
                                                                    predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
    return __ballot_sync(mask, predicate == 0, file, line) == 0;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value, EMULATION_SITE) {
    return static_cast<unsigned>(
        emulation::machine().warp_exchange(emulation::Exchange::kMatch, mask, value, 0, {file, line}));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATION_SITE) {
    return static_cast<unsigned>(
        emulation::machine().warp_exchange(emulation::Exchange::kAdd, mask, value, 0, {file, line}));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATION_SITE) {
    return static_cast<unsigned>(
        emulation::machine().warp_exchange(emulation::Exchange::kMin, mask, value, 0, {file, line}));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATION_SITE) {
    return static_cast<unsigned>(
        emulation::machine().warp_exchange(emulation::Exchange::kMax, mask, value, 0, {file, line}));
}

// ---- integer atomics, loads and bit operations ----------------------------------------------------------------

// One operating-system thread, so a plain read-modify-write is atomic. Integers only.
#define EMULATION_INTEGER typename T, typename = std::enable_if_t<std::is_integral<T>::value && sizeof(T) >= 4>
template <EMULATION_INTEGER>
T atomicAdd(T* address, std::common_type_t<T> value) {
    const T old = *address;
    *address = static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
    return old;
}
template <EMULATION_INTEGER>
T atomicMin(T* address, std::common_type_t<T> value) {
    const T old = *address;
    if (value < old) *address = value;
    return old;
}
template <EMULATION_INTEGER>
T atomicMax(T* address, std::common_type_t<T> value) {
    const T old = *address;
    if (value > old) *address = value;
    return old;
}
template <EMULATION_INTEGER>
T atomicOr(T* address, std::common_type_t<T> value) {
    const T old = *address;
    *address = old | value;
    return old;
}
template <EMULATION_INTEGER>
T atomicExch(T* address, std::common_type_t<T> value) {
    const T old = *address;
    *address = value;
    return old;
}
template <EMULATION_INTEGER>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, T value) {
    *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// ---- asynchronous copies to shared memory ---------------------------------------------------------------------

// A copy takes place when its thread waits for it, and no sooner: until then the memory is poisoned.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, EMULATION_SITE) {
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
        emulation::machine().fail("misaligned asynchronous copy", {file, line});
    }
    emulation::Fiber& self = emulation::machine().current();
    std::memset(to, 0xff, bytes);
    self.copies.push_back({to, from, bytes, self.committed});
}
inline void __pipeline_commit() { ++emulation::machine().current().committed; }
inline void __pipeline_wait_prior(size_t prior) {
    emulation::Fiber& self = emulation::machine().current();
    size_t left = 0;
    for (const emulation::AsyncCopy& copy : self.copies) {
        if (copy.group + prior >= self.committed) {
            self.copies[left++] = copy;
            continue;
        }
        std::memcpy(copy.to, copy.from, copy.bytes);
        self.unpublished_copies = true;
    }
    self.copies.resize(left);
}

// ---- half precision -------------------------------------------------------------------------------------------

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __half2float(__half value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1fu;
    const uint32_t mantissa = value.bits & 0x3ffu;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -subnormal : subnormal;
}
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __half __float2half_rn(float value) {
    const auto sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000u);
    const float magnitude = std::fabs(value);
    if (value != value) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    // The last place that fp16 keeps of this number; nearbyint rounds ties to even.
    const int last = (exponent < -13 ? -13 : exponent) - 11;
    const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -last)));
    // In units of the last place, 1024 of them are the implicit bit: a carry moves on to the exponent by itself.
    const unsigned bits = magnitude == 0.0f ? 0u : units + (static_cast<unsigned>(last + 24) << 10);
    return {static_cast<uint16_t>(sign | bits)};
}
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

#include "matrices.h"

#include "hopper.h"
