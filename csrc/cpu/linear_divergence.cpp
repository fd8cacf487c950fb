#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../arguments.h"
#include "head_products.h"
#include "kernels.h"
#include "parallel.h"

namespace vgpo {
namespace {

// Pairs of rows before some entries of the vocabulary: rows 2 i and 2 i + 1 are the views of pair i.
struct PairChunk {
    const at::Tensor& rows;    // [2 n, D]
    const at::Tensor& weight;  // [v, D]
    const float* bias[2];      // [v], or null
    int64_t pairs;
    LogitMaps maps;
    Rows products;   // [2 n, v]
    bool recompute;  // else the products are there

    int64_t columns() const { return weight.size(0); }

    // Calls work(pair, tile, row) for every pair of every tile: row has the pair's products and bias in the tile.
    template <typename Work>
    void for_each_pair(const at::Tensor& logits, const Work& work) const {
        const auto visit = [&](const Tile& tile) {
            for (int64_t r = 0; r < tile.rows; r += 2) {
                const int64_t pair = (tile.row + r) / 2;
                PairRow row = {};
                for (int view = 0; view < 2; ++view) {
                    row.products[view] = tile.products.at(r + view, 0);
                    row.bias[view] = bias[view] == nullptr ? nullptr : bias[view] + tile.column;
                }
                row.map = maps.of_row(pair);
                row.target = -1;
                work(pair, tile, row);
            }
        };
        if (recompute && in_bf16(rows, weight)) {
            for_each_product(rows, weight, {nullptr, 0}, visit);
            return;
        }
        if (recompute) torch_product(rows, weight.t(), logits, false);
        for_each_strip(2 * pairs, columns(), products, visit);
    }
};

PairChunk chunk_of(const ArgumentReader& reader, int64_t pairs) {
    const at::Tensor &rows = reader.tensor("rows"), &weight = reader.tensor("weight");
    check_head(rows, weight);
    const bool recompute = reader.value<bool>("recompute");
    TORCH_CHECK_VALUE(!recompute || rows.size(0) == 2 * pairs, "rows must be the two views of ", pairs, " pairs, got ",
                      rows.sizes());
    const int64_t columns = weight.size(0);
    return {rows,
            weight,
            {reader.data<float>("bias", {columns}), reader.data<float>("other_bias", {columns})},
            pairs,
            reader.logit_maps(pairs),
            written_rows_of(reader, "logits", 2 * pairs, columns),
            recompute};
}

PairNormalisers normalisers_of(const Rows& rows, int64_t pair) {
    return {{*rows.at(0, pair), *rows.at(2, pair)}, {*rows.at(1, pair), *rows.at(3, pair)}};
}

// Calls work(pair) for every pair.
template <typename Work>
void for_pairs(int64_t pairs, const Work& work) {
    at::parallel_for(0, pairs, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) work(pair);
    });
}

}  // namespace

namespace ops {
namespace {

Tensors pair_statistics(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("targets").numel();
    const PairChunk chunk = chunk_of(reader, pairs);
    const int64_t groups = groups_of(chunk.columns()), first = reader.value<int64_t>("first");
    const int64_t* const targets = reader.data<int64_t>("targets", {pairs});
    const Rows running = written_rows_of(reader, "sums", 11, pairs);
    std::vector<PairStatistics> partial(static_cast<size_t>(groups * pairs));
    chunk.for_each_pair(reader.tensor("logits"), [&](int64_t pair, const Tile& tile, const PairRow& row) {
        kernels().pair_statistics(row, tile.columns, partial[tile.column / kGroupColumns * pairs + pair]);
        const int64_t target = column_of(targets[pair], first, chunk.columns()) - tile.column;
        if (target < 0 || target >= tile.columns) return;
        for (int view = 0; view < 2; ++view) {
            const float offset = row.bias[view] == nullptr ? 0.0f : row.bias[view][target];
            *running.at(4 * view + 3, pair) = row.map.logit(row.products[view][target] + offset);
        }
    });
    for_pairs(pairs, [&](int64_t pair) {
        PairStatistics total;
        for (int view = 0; view < 2; ++view) {
            total.view[view] = {*running.at(4 * view, pair), *running.at(4 * view + 1, pair),
                                *running.at(4 * view + 2, pair)};
            total.distance[view] = *running.at(8 + view, pair);
        }
        total.root = *running.at(10, pair);
        for (int64_t group = 0; group < groups; ++group) total.merge(partial[group * pairs + pair]);
        for (int view = 0; view < 2; ++view) {
            *running.at(4 * view, pair) = total.view[view].maximum;
            *running.at(4 * view + 1, pair) = total.view[view].total;
            *running.at(4 * view + 2, pair) = total.view[view].weighted;
            *running.at(8 + view, pair) = total.distance[view];
        }
        *running.at(10, pair) = total.root;
    });
    return {};
}

Tensors pair_shares(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("totals").dim() == 2 ? reader.tensor("totals").size(1) : 0;
    const PairChunk chunk = chunk_of(reader, pairs);
    const int64_t groups = groups_of(chunk.columns());
    const Rows totals = rows_of(reader, "totals", 4, pairs), sums = written_rows_of(reader, "sums", 4, pairs);
    const float js_beta = static_cast<float>(reader.value<double>("js_beta"));
    std::vector<PairShares> partial(static_cast<size_t>(groups * pairs));
    chunk.for_each_pair(reader.tensor("logits"), [&](int64_t pair, const Tile& tile, const PairRow& row) {
        kernels().pair_shares(row, tile.columns, normalisers_of(totals, pair), js_beta,
                              partial[tile.column / kGroupColumns * pairs + pair]);
    });
    for_pairs(pairs, [&](int64_t pair) {
        for (int64_t group = 0; group < groups; ++group) {
            const PairShares& share = partial[group * pairs + pair];
            *sums.at(0, pair) += share.js;
            *sums.at(1, pair) += share.tv;
            *sums.at(2, pair) += share.js_p;
            *sums.at(3, pair) += share.sign_p;
        }
    });
    return {};
}

Tensors pair_gradient(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("targets").numel();
    const PairChunk chunk = chunk_of(reader, pairs);
    const int64_t first = reader.value<int64_t>("first");
    const int64_t* const targets = reader.data<int64_t>("targets", {pairs});
    const Rows coefficients = rows_of(reader, "coefficients", 20, pairs);
    const float js_beta = static_cast<float>(reader.value<double>("js_beta"));
    const bool narrow = chunk.rows.scalar_type() == at::kBFloat16;
    const auto write = kernels().pair_gradient[narrow ? 1 : 0];
    chunk.for_each_pair(reader.tensor("logits"), [&](int64_t pair, const Tile& tile, PairRow row) {
        PairGradient gradient = {};
        for (int view = 0; view < 2; ++view) {
            const auto c = [&](int64_t i) { return *coefficients.at(4 + 8 * view + i, pair); };
            gradient.view[view] = {c(0), c(1), c(2), c(3), c(4), c(5), c(6), c(7)};
            float* const begin = chunk.products.at(2 * pair + view, 0);
            gradient.out[view] = narrow ? static_cast<void*>(reinterpret_cast<BFloat16*>(begin) + tile.column)
                                        : static_cast<void*>(begin + tile.column);
        }
        row.target = column_of(targets[pair], first, chunk.columns()) - tile.column;
        write(row, tile.columns, normalisers_of(coefficients, pair), gradient, js_beta);
    });
    return {};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("pair_statistics", by_name<pair_statistics, Values::kChecked>());
    library.impl("pair_shares", by_name<pair_shares, Values::kChecked>());
    library.impl("pair_gradient", by_name<pair_gradient, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
