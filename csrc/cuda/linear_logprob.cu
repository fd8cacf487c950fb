// The arithmetic of an LM head's chunks on CUDA: products by cuBLAS through ATen, epilogues, registration.
#include <torch/library.h>

#include "head_products.cuh"
#include "head_tiles.h"

namespace vgpo {
namespace cuda {
namespace {

// `width`: columns of what `logits` is, a place for the products or a workspace for tiles.
HeadRows head_rows(const ArgumentReader& reader, int64_t width) {
    const at::Tensor &hidden = reader.tensor("hidden"), &weight = reader.tensor("weight");
    TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && weight.device() == hidden.device() &&
                          weight.scalar_type() == hidden.scalar_type() && weight.size(1) == hidden.size(1),
                      "hidden and weight must be matrices of one dtype with as many columns on one device, got ",
                      hidden.scalar_type(), " ", hidden.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    TORCH_CHECK_VALUE(rows <= kMostRows && columns <= kMostRows, "more than ", kMostRows,
                      " rows or columns: ", rows, " and ", columns);
    return {reader.written_rows("logits", rows, width),
            reader.tensor("logits").stride(0),
            reader.data<float>("bias", {columns}),
            reader.data<int64_t>("targets", {rows}),
            reader.value<int64_t>("first"),
            static_cast<int>(columns),
            reader.logit_maps(rows)};
}

Tensors head_product(const ArgumentReader& reader) {
    const at::Tensor &left = reader.tensor("left"), &right = reader.tensor("right");
    TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0) &&
                          left.scalar_type() == right.scalar_type(),
                      "left and right must be matrices of one dtype that can be multiplied, got ", left.scalar_type(),
                      " ", left.sizes(), " and ", right.scalar_type(), " ", right.sizes());
    reader.written_rows("result", left.size(0), right.size(1));
    multiply(left, right, reader.tensor("result"), reader.value<bool>("accumulate"));
    return {};
}

bool tiles_can(const ArgumentReader& reader) {
    // A tile's epilogue has one factor for all rows, and no cap.
    const bool plain = !reader.has("temperatures") && reader.value<double>("softcap") == 0.0;
    return suits_tiles(reader.tensor("hidden"), reader.tensor("weight"), reader.has("bias")) && plain;
}

// The products of a chunk, where its logits will be.
void multiply_chunk(const ArgumentReader& reader) {
    multiply(reader.tensor("hidden"), reader.tensor("weight").t(), reader.tensor("logits"), false);
}

Tensors head_statistics(const ArgumentReader& reader) {
    const at::Tensor &hidden = reader.tensor("hidden"), &weight = reader.tensor("weight");
    const at::Tensor& logits = reader.tensor("logits");
    const int64_t columns = weight.dim() == 2 ? weight.size(0) : 0, width = tile_workspace_columns(columns);
    const bool squares = reader.shape("statistics")[0] == kSquaresRow + 1, keep = reader.value<bool>("keep");
    // Products stay in any case. Only tiles have no place for them: a narrower workspace asks for those.
    const bool in_tiles = !keep && !squares && width < columns && logits.dim() == 2 && logits.size(1) == width &&
                          logits.is_contiguous() && tiles_can(reader);
    HeadStatisticsArguments arguments = {};
    arguments.rows = head_rows(reader, in_tiles ? width : columns);
    const int64_t running = squares ? kSquaresRow + 1 : kSquaresRow;
    arguments.statistics = reader.written_rows("statistics", running, reader.shape("hidden")[0]);
    arguments.statistics_stride = reader.tensor("statistics").stride(0);
    if (in_tiles) {
        launch_tile_statistics(hidden, weight, arguments);
        return {};
    }
    multiply_chunk(reader);
    by_flag(arguments.rows.maps.capped(), [&](auto capped) {
        by_flag(squares, [&](auto with_squares) {
            constexpr bool kCapped = decltype(capped)::value, kSquares = decltype(with_squares)::value;
            launch_rows(head_statistics_kernel<kHeadThreads, kCapped, kSquares>, arguments, logits);
        });
    });
    return {};
}

Tensors head_gradient(const ArgumentReader& reader) {
    const HiddenType type = reader.type("hidden");
    HeadGradientArguments arguments = {};
    arguments.rows = head_rows(reader, reader.shape("weight")[0]);
    arguments.coefficients = reader.rows("coefficients", 5, reader.shape("hidden")[0]);
    arguments.coefficients_stride = reader.tensor("coefficients").stride(0);
    if (reader.value<bool>("recompute")) {
        if (tiles_can(reader)) {
            launch_tile_gradient(reader.tensor("hidden"), reader.tensor("weight"), arguments);
            return {};
        }
        multiply_chunk(reader);
    }
    by_type(type, [&](auto* element) {
        by_flag(arguments.rows.maps.capped(), [&](auto capped) {
            launch_rows(head_gradient_kernel<std::remove_pointer_t<decltype(element)>, decltype(capped)::value>,
                        arguments, reader.tensor("logits"));
        });
    });
    return {};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("head_statistics", by_name<head_statistics, Values::kClamped>());
    library.impl("head_gradient", by_name<head_gradient, Values::kClamped>());
    library.impl("head_product", by_name<head_product, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
