// The kernels compiled for AVX512, by pragma instead of by compiler flag: one build runs on every processor.
#if defined(__x86_64__) && defined(__GNUC__)

#ifndef __clang__
// GCC's own header declares its undefined registers in a way that GCC 12 then warns about.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Standard headers come before the pragma, so that no shared function is compiled for this instruction set.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "kernels.h"
#include "simd/types.h"

#define VGPO_SIMD_NAME "avx512"

namespace vgpo::avx512 {
namespace {
#include "simd/vector_avx512.h"

#include "simd/kernels.h"
}  // namespace
}  // namespace vgpo::avx512

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vgpo {
const Kernels* const avx512_kernels = &avx512::kTable;
}

#else

#include "kernels.h"

namespace vgpo {
const Kernels* const avx512_kernels = nullptr;
}

#endif
