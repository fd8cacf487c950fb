// Matrix products of bfloat16 matrices in fp32, on the processor's matrix units: torch's own product of them rounds its
// result to bfloat16, and a logit of 20 would then be known to 0.06.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

#include "simd/types.h"

namespace vgpo {

// A matrix of which either rows or columns are contiguous.
struct BFloat16Matrix {
    const BFloat16* data;
    int64_t rows, columns;
    int64_t row_stride, column_stride;  // in elements; one of them is 1
};

// Rows of the left matrix and columns of the right one that are multiplied at a time: their product, kTileRows by
// kTileColumns in fp32, stays in the cache.
constexpr int64_t kTileRows = 256;
constexpr int64_t kPanelColumns = 64;
constexpr int64_t kTileColumns = 4 * kPanelColumns;

// Memory for a whole number of cache lines: the matrix units read a line at a time, and half as fast across two.
template <typename T>
class LineAligned {
public:
    LineAligned() = default;
    explicit LineAligned(int64_t count)
        : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(count) * sizeof(T))) {}

    T* data() const { return static_cast<T*>(memory_.get()); }

private:
    c10::DataPtr memory_;
};

// Whether this processor multiplies bfloat16 in hardware, and torch brings the kernel for it.
bool has_bf16_products();

// A right matrix in the order that the matrix units read: panels of kPanelColumns columns, pairs of rows side by side.
// Packed by all threads.
class PackedColumns {
public:
    explicit PackedColumns(const BFloat16Matrix& matrix);

    int64_t panels() const { return (columns_ + kPanelColumns - 1) / kPanelColumns; }
    int64_t depth() const { return depth_; }  // rows, rounded up to an even number
    const BFloat16* panel(int64_t column) const { return data_.data() + column * depth_; }

private:
    int64_t columns_, depth_;
    LineAligned<BFloat16> data_;
};

// Rows of a left matrix as the matrix units read them: in place where that is possible, else copied.
class LeftRows {
public:
    LeftRows(const BFloat16Matrix& matrix, int64_t begin, int64_t count);

    int64_t rows() const { return rows_; }
    int64_t stride() const { return stride_; }
    const BFloat16* data() const { return data_; }

private:
    int64_t rows_, stride_;
    const BFloat16* data_;
    LineAligned<BFloat16> copy_;
};

// result [rows, columns] = (or +=) rows [rows, depth] times the first columns of a panel; strides in elements, depth
// even. A thread calls release_products() after its last product.
void multiply_panel(const BFloat16* rows, int64_t count, int64_t stride, const BFloat16* panel, int64_t columns,
                    int64_t depth, float* result, int64_t result_stride, bool accumulate);
// result [rows, columns] = (or +=) rows times the columns [begin, begin + columns) of the right matrix; begin is a
// multiple of kPanelColumns.
void multiply(const LeftRows& rows, const PackedColumns& right, int64_t begin, int64_t columns, float* result,
              int64_t result_stride, bool accumulate);
void release_products();

}  // namespace vgpo
