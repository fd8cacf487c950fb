// The kernels compiled for 64-bit ARM, whose every processor has NEON, and a second table with products of bfloat16,
// which not every one has.
#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "simd/types.h"

#ifndef __clang__
// Ahead of register allocation, GCC's scheduler would move the loads of an iteration to its top, and sums to memory.
#pragma GCC optimize("no-schedule-insns")
#endif

#define VGPO_SIMD_NAME "neon"

// A function with BFMMLA. Older releases of clang declare its intrinsic only where all code may use it.
#ifndef __clang__
#define VGPO_BFMMLA __attribute__((target("arch=armv8.2-a+bf16")))
#elif __clang_major__ >= 16
#define VGPO_BFMMLA __attribute__((target("bf16")))
#endif

namespace vgpo::neon {
namespace {
#include "simd/vector_neon.h"

#include "simd/kernels.h"

#ifdef VGPO_BFMMLA
#include "simd/attention_bfmmla.h"
#endif
}  // namespace
}  // namespace vgpo::neon

namespace vgpo {
const Kernels* const neon_kernels = &neon::kTable;
#ifdef VGPO_BFMMLA
const Kernels* const neon_bf16_kernels = &neon::kBf16Table;
#else
const Kernels* const neon_bf16_kernels = nullptr;
#endif
}  // namespace vgpo

#else

#include "kernels.h"

namespace vgpo {
const Kernels* const neon_kernels = nullptr;
const Kernels* const neon_bf16_kernels = nullptr;
}  // namespace vgpo

#endif
