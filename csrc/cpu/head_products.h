// Products of rows and an LM head's weight on the CPU, tile by tile, for the operators that make something of them.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../arguments.h"
#include "bf16_product.h"
#include "parallel.h"

namespace vgpo {

// Columns whose statistics are summed on their own, and then merged in order: the same for any number of threads.
constexpr int64_t kGroupColumns = 4 * kTileColumns;
// Rows of one item of work where the products are there already. Even, so that pairs of rows stay together.
constexpr int64_t kStripRows = 16;

// Rows of fp32, each contiguous.
struct Rows {
    float* data;
    int64_t stride;

    float* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Products of rows [row, row + rows) and columns [column, column + columns); columns begin and end with a group, or
// lie in one.
struct Tile {
    Rows products;
    int64_t row, rows, column, columns;
};

inline bool in_bf16(const at::Tensor& left, const at::Tensor& right) {
    return left.scalar_type() == at::kBFloat16 && right.scalar_type() == at::kBFloat16 && has_bf16_products();
}

inline BFloat16Matrix matrix_of(const at::Tensor& tensor) {
    return {static_cast<const BFloat16*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0),
            tensor.stride(1)};
}

inline Rows rows_of(const ArgumentReader& reader, const char* name, int64_t rows, int64_t columns) {
    return {reader.rows(name, rows, columns), reader.tensor(name).stride(0)};
}

inline Rows written_rows_of(const ArgumentReader& reader, const char* name, int64_t rows, int64_t columns) {
    return {reader.written_rows(name, rows, columns), reader.tensor(name).stride(0)};
}

// Raises unless rows and weight are matrices whose products can be computed here.
inline void check_head(const at::Tensor& rows, const at::Tensor& weight) {
    for (const at::Tensor* tensor : {&rows, &weight}) {
        TORCH_CHECK_VALUE(tensor->device().is_cpu() && tensor->dim() == 2 && tensor->stride(1) == 1 &&
                              (tensor->scalar_type() == at::kFloat || tensor->scalar_type() == at::kBFloat16),
                          "rows and weight must be fp32 or bf16 matrices with contiguous rows on the CPU, got ",
                          tensor->scalar_type(), " ", tensor->sizes());
    }
    TORCH_CHECK_VALUE(rows.size(1) == weight.size(1) && rows.size(1) > 0 && rows.scalar_type() == weight.scalar_type(),
                      "rows and weight must have one dtype and as many columns, at least one, got ", rows.sizes(),
                      " and ", weight.sizes());
}

// Writes left @ right to `result`, or adds it, where the processor has no units for it that torch opens to us.
inline void torch_product(const at::Tensor& left, const at::Tensor& right, at::Tensor result, bool accumulate) {
    const at::Tensor wide_left = left.to(at::kFloat), wide_right = right.to(at::kFloat);
    if (accumulate) {
        at::addmm_out(result, result, wide_left, wide_right);
    } else {
        at::mm_out(result, wide_left, wide_right);
    }
}

inline int64_t groups_of(int64_t columns) { return (columns + kGroupColumns - 1) / kGroupColumns; }

// Calls work(tile) for tiles that cover products already there: whole groups of a few rows.
template <typename Work>
void for_each_strip(int64_t count, int64_t width, const Rows& products, const Work& work) {
    parallel_items((count + kStripRows - 1) / kStripRows, [&](int64_t strip) {
        const int64_t row = strip * kStripRows, rows = std::min(kStripRows, count - row);
        for (int64_t column = 0; column < width; column += kGroupColumns) {
            const int64_t columns = std::min(kGroupColumns, width - column);
            work(Tile{{products.at(row, column), products.stride}, row, rows, column, columns});
        }
    });
}

// Calls work(tile) for tiles of products as they are computed, while they are in the cache. They are written to
// `kept`, or to the thread's own memory if that is null.
template <typename Work>
void for_each_product(const at::Tensor& hidden, const at::Tensor& weight, const Rows& kept, const Work& work) {
    const PackedColumns right(matrix_of(weight.t()));
    const BFloat16Matrix left = matrix_of(hidden);
    const int64_t blocks = (hidden.size(0) + kTileRows - 1) / kTileRows, groups = groups_of(weight.size(0));
    // Columns are shared out only where there are too few rows for all threads.
    const int64_t wanted = 4 * static_cast<int64_t>(at::get_num_threads());
    const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(groups, 1));
    const int64_t groups_of_part = (groups + parts - 1) / parts;
    parallel_items(blocks * parts, [&](int64_t item) {
        const int64_t row = item / parts * kTileRows, rows = std::min(kTileRows, hidden.size(0) - row);
        const int64_t begin = item % parts * groups_of_part * kGroupColumns;
        const int64_t end = std::min(begin + groups_of_part * kGroupColumns, weight.size(0));
        if (begin >= end) return;
        const LeftRows states(left, row, rows);
        const LineAligned<float> own(kept.data == nullptr ? kTileRows * kTileColumns : 0);
        for (int64_t column = begin; column < end; column += kTileColumns) {
            const int64_t columns = std::min(kTileColumns, end - column);
            const Rows products = kept.data == nullptr ? Rows{own.data(), kTileColumns}
                                                       : Rows{kept.at(row, column), kept.stride};
            multiply(states, right, column, columns, products.data, products.stride, false);
            work(Tile{products, row, rows, column, columns});
        }
        release_products();
    });
}

}  // namespace vgpo
