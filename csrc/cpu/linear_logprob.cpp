#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../arguments.h"
#include "head_products.h"
#include "kernels.h"
#include "parallel.h"

namespace vgpo {
namespace {

// Some rows before some entries of the vocabulary.
struct Chunk {
    const at::Tensor& hidden;  // [n, D]
    const at::Tensor& weight;  // [v, D]
    const float* bias;         // [v], or null
    const int64_t* targets;    // [n]
    int64_t first;
    LogitMaps maps;

    int64_t rows() const { return hidden.size(0); }
    int64_t columns() const { return weight.size(0); }
    // The column of a row's target, or -1.
    int64_t target(int64_t row) const { return column_of(targets[row], first, columns()); }
};

Chunk chunk_of(const ArgumentReader& reader) {
    const at::Tensor &hidden = reader.tensor("hidden"), &weight = reader.tensor("weight");
    check_head(hidden, weight);
    return {hidden,
            weight,
            reader.data<float>("bias", {weight.size(0)}),
            reader.data<int64_t>("targets", {hidden.size(0)}),
            reader.value<int64_t>("first"),
            reader.logit_maps(hidden.size(0))};
}

}  // namespace

namespace ops {
namespace {

Tensors head_statistics(const ArgumentReader& reader) {
    const Chunk chunk = chunk_of(reader);
    const bool keep = reader.value<bool>("keep");
    const int64_t rows = chunk.rows(), groups = groups_of(chunk.columns());
    const bool squares = reader.shape("statistics")[0] == kSquaresRow + 1;
    const Rows running = written_rows_of(reader, "statistics", squares ? kSquaresRow + 1 : kSquaresRow, rows);
    const Rows products = written_rows_of(reader, "logits", rows, chunk.columns());
    const auto statistics_of = kernels().logit_statistics[squares ? 1 : 0];
    std::vector<LogitStatistics> partial(static_cast<size_t>(groups * rows));
    std::vector<float> partial_squares(squares ? partial.size() : 0);
    const auto take = [&](const Tile& tile) {
        const float* offsets = chunk.bias == nullptr ? nullptr : chunk.bias + tile.column;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = tile.row + r, target = chunk.target(row) - tile.column;
            const LogitMap map = chunk.maps.of_row(row);
            const float* values = tile.products.at(r, 0);
            const int64_t place = tile.column / kGroupColumns * rows + row;
            float* const of_row = squares ? &partial_squares[place] : nullptr;
            statistics_of(values, offsets, tile.columns, map, partial[place], of_row);
            if (0 <= target && target < tile.columns) {
                const float offset = offsets == nullptr ? 0.0f : offsets[target];
                *running.at(3, row) = map.logit(values[target] + offset);
            }
        }
    };
    if (in_bf16(chunk.hidden, chunk.weight)) {
        for_each_product(chunk.hidden, chunk.weight, keep ? products : Rows{nullptr, 0}, take);
    } else {
        torch_product(chunk.hidden, chunk.weight.t(), reader.tensor("logits"), false);
        for_each_strip(chunk.rows(), chunk.columns(), products, take);
    }
    at::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            LogitStatistics total = {*running.at(0, row), *running.at(1, row), *running.at(2, row)};
            float sum_squares = squares ? *running.at(kSquaresRow, row) : 0.0f;
            for (int64_t group = 0; group < groups; ++group) {
                const LogitStatistics& other = partial[group * rows + row];
                if (other.total == 0.0f) continue;
                const float before = total.maximum;
                total.merge(other);
                if (!squares) continue;
                sum_squares *= expf(2.0f * (before - total.maximum));
                sum_squares += partial_squares[group * rows + row] * expf(2.0f * (other.maximum - total.maximum));
            }
            *running.at(0, row) = total.maximum;
            *running.at(1, row) = total.total;
            *running.at(2, row) = total.weighted;
            if (squares) *running.at(kSquaresRow, row) = sum_squares;
        }
    });
    return {};
}

Tensors head_gradient(const ArgumentReader& reader) {
    const Chunk chunk = chunk_of(reader);
    const bool recompute = reader.value<bool>("recompute");
    const Rows of_row = rows_of(reader, "coefficients", 5, chunk.rows());
    const Rows products = written_rows_of(reader, "logits", chunk.rows(), chunk.columns());
    const bool narrow = chunk.hidden.scalar_type() == at::kBFloat16;
    const auto gradient = kernels().logit_gradient[narrow ? 1 : 0];
    const auto turn = [&](const Tile& tile) {
        const float* offsets = chunk.bias == nullptr ? nullptr : chunk.bias + tile.column;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = tile.row + r;
            const LogitGradient coefficient = {
                *of_row.at(0, row), *of_row.at(1, row), *of_row.at(2, row), *of_row.at(3, row), *of_row.at(4, row),
                chunk.target(row) - tile.column,
            };
            float* const begin = products.at(row, 0);
            void* const to = narrow ? static_cast<void*>(reinterpret_cast<BFloat16*>(begin) + tile.column)
                                    : static_cast<void*>(begin + tile.column);
            gradient(tile.products.at(r, 0), offsets, tile.columns, chunk.maps.of_row(row), coefficient, to);
        }
    };
    if (recompute && in_bf16(chunk.hidden, chunk.weight)) {
        for_each_product(chunk.hidden, chunk.weight, {nullptr, 0}, turn);
        return {};
    }
    if (recompute) torch_product(chunk.hidden, chunk.weight.t(), reader.tensor("logits"), false);
    // A row's narrow gradient overtakes none of its products as long as one thread goes through it in order.
    for_each_strip(chunk.rows(), chunk.columns(), products, turn);
    return {};
}

Tensors head_product(const ArgumentReader& reader) {
    const at::Tensor &left = reader.tensor("left"), &right = reader.tensor("right");
    const bool accumulate = reader.value<bool>("accumulate");
    TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0),
                      "left and right must be matrices that can be multiplied, got ", left.sizes(), " and ",
                      right.sizes());
    const Rows products = written_rows_of(reader, "result", left.size(0), right.size(1));
    const auto usable = [](const at::Tensor& matrix) { return matrix.stride(0) == 1 || matrix.stride(1) == 1; };
    if (!in_bf16(left, right) || !usable(left) || !usable(right) || left.size(1) == 0) {
        torch_product(left, right, reader.tensor("result"), accumulate);
        return {};
    }
    const PackedColumns packed_right(matrix_of(right));
    const BFloat16Matrix matrix = matrix_of(left);
    const int64_t blocks = (left.size(0) + kTileRows - 1) / kTileRows;
    const int64_t panels = (right.size(1) + kTileColumns - 1) / kTileColumns;
    const int64_t wanted = 4 * static_cast<int64_t>(at::get_num_threads());
    const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(panels, 1));
    const int64_t columns_of_part = (panels + parts - 1) / parts * kTileColumns;
    parallel_items(blocks * parts, [&](int64_t item) {
        const int64_t row = item / parts * kTileRows, rows = std::min(kTileRows, left.size(0) - row);
        const int64_t begin = item % parts * columns_of_part;
        const int64_t columns = std::min(columns_of_part, right.size(1) - begin);
        if (columns <= 0) return;
        multiply(LeftRows(matrix, row, rows), packed_right, begin, columns, products.at(row, begin), products.stride,
                 accumulate);
        release_products();
    });
    return {};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("head_statistics", by_name<head_statistics, Values::kChecked>());
    library.impl("head_gradient", by_name<head_gradient, Values::kChecked>());
    library.impl("head_product", by_name<head_product, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
