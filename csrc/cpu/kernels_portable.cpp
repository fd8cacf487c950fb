// The kernels for any processor.
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "simd/types.h"

#define VGPO_SIMD_NAME "portable"

namespace vgpo::portable {
namespace {
#include "simd/vector_portable.h"

#include "simd/kernels.h"

// BLAS has code for the wider registers that most processors have.
constexpr Kernels with_blas(Kernels table) {
    table.scores_by_blas = true;
    return table;
}

constexpr Kernels kBlasTable = with_blas(kTable);
}  // namespace
}  // namespace vgpo::portable

namespace vgpo {
const Kernels* const portable_kernels = &portable::kBlasTable;
}
