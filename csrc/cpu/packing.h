// How matrices of 16-bit numbers are laid out for the matrix units: copies and transpositions.
#pragma once

#include <cstdint>

#include "bf16_product.h"

namespace vgpo {

// Columns [column, column + width) of `matrix`, pairs of rows side by side: panel[(k / 2 * width + c) * 2 + k % 2] is
// element (k, column + c), k < depth, zero outside the matrix. `depth` is even, `width` a multiple of 16.
void pack_panel(const BFloat16Matrix& matrix, int64_t column, int64_t width, int64_t depth, BFloat16* panel);

// Rows [begin, begin + count) of `matrix`: packed[r * stride + k], k < depth, zero outside the matrix. `depth` is even.
void pack_rows(const BFloat16Matrix& matrix, int64_t begin, int64_t count, int64_t depth, int64_t stride,
               BFloat16* packed);

}  // namespace vgpo
