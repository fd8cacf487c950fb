#include "bf16_product.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>

#include "packing.h"
#include "parallel.h"

namespace vgpo {
namespace {

// Rows of the right matrix that are multiplied at a time: what is read of both matrices then fits the cache.
constexpr int64_t kDepthBlock = 1024;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLine = kLineBytes / sizeof(BFloat16);
// Rows at a distance of a multiple of 4 KiB fall into the same few sets of the cache.
constexpr int64_t kAliasedStride = 4096 / sizeof(BFloat16);

int64_t even(int64_t value) { return (value + 1) / 2 * 2; }

// The distance of packed rows: an odd number of cache lines.
int64_t padded_stride(int64_t columns) { return ((columns + kLine - 1) / kLine | 1) * kLine; }

const c10::BFloat16* as_torch(const BFloat16* values) { return reinterpret_cast<const c10::BFloat16*>(values); }

}  // namespace

bool has_bf16_products() { return at::native::cpublas::could_pack(at::kBFloat16); }

PackedColumns::PackedColumns(const BFloat16Matrix& matrix)
    : columns_(matrix.columns), depth_(even(matrix.rows)), data_(panels() * kPanelColumns * depth_) {
    parallel_items(panels(), [&](int64_t panel) {
        const int64_t column = panel * kPanelColumns;
        pack_panel(matrix, column, kPanelColumns, depth_, data_.data() + column * depth_);
    });
}

LeftRows::LeftRows(const BFloat16Matrix& matrix, int64_t begin, int64_t count)
    : rows_(count), stride_(matrix.row_stride), data_(matrix.data + begin * matrix.row_stride) {
    const bool aligned = reinterpret_cast<uintptr_t>(data_) % kLineBytes == 0 && stride_ % kLine == 0;
    if (matrix.column_stride == 1 && matrix.columns % 2 == 0 && aligned && stride_ % kAliasedStride != 0) return;
    stride_ = padded_stride(matrix.columns);
    copy_ = LineAligned<BFloat16>(rows_ * stride_);
    pack_rows(matrix, begin, count, even(matrix.columns), stride_, copy_.data());
    data_ = copy_.data();
}

void multiply_panel(const BFloat16* rows, int64_t count, int64_t stride, const BFloat16* panel, int64_t columns,
                    int64_t depth, float* result, int64_t result_stride, bool accumulate) {
    at::native::cpublas::brgemm(count, columns, depth, stride, kPanelColumns, result_stride, accumulate, as_torch(rows),
                                as_torch(panel), result);
}

void multiply(const LeftRows& rows, const PackedColumns& right, int64_t begin, int64_t columns, float* result,
              int64_t result_stride, bool accumulate) {
    for (int64_t tile = 0; tile < columns; tile += kTileColumns) {
        const int64_t end = std::min(tile + kTileColumns, columns);
        for (int64_t k = 0; k < right.depth(); k += kDepthBlock) {
            const int64_t depth = std::min(kDepthBlock, right.depth() - k);
            for (int64_t column = tile; column < end; column += kPanelColumns) {
                multiply_panel(rows.data() + k, rows.rows(), rows.stride(),
                               right.panel(begin + column) + k * kPanelColumns, std::min(kPanelColumns, end - column),
                               depth, result + column, result_stride, accumulate || k > 0);
            }
        }
    }
}

void release_products() { at::native::cpublas::brgemm_release(); }

}  // namespace vgpo
