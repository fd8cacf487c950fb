// The kernels compiled for AVX2, by pragma instead of by compiler flag: one build runs on every processor.
#if defined(__x86_64__) && defined(__GNUC__)

// Standard headers come before the pragma, so that no shared function is compiled for this instruction set.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels.h"
#include "simd/types.h"

#define VGPO_SIMD_NAME "avx2"

namespace vgpo::avx2 {
namespace {
#include "simd/vector_avx2.h"

#include "simd/kernels.h"
}  // namespace
}  // namespace vgpo::avx2

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vgpo {
const Kernels* const avx2_kernels = &avx2::kTable;
}

#else

#include "kernels.h"

namespace vgpo {
const Kernels* const avx2_kernels = nullptr;
}

#endif
