// The arithmetic of an LM head's chunks of pairs on CUDA: products by cuBLAS through ATen, epilogues, registration.
#include "linear_divergence.cuh"

#include <torch/library.h>

#include "head_products.cuh"

namespace vgpo {
namespace cuda {
namespace {

// The rows of a chunk of so many pairs, with their products: computed here, or those that are there.
PairRows pair_rows(const ArgumentReader& reader, int64_t pairs, const int64_t* targets, int64_t first) {
    const at::Tensor &rows = reader.tensor("rows"), &weight = reader.tensor("weight"), &logits = reader.tensor("logits");
    TORCH_CHECK_VALUE(rows.dim() == 2 && weight.dim() == 2 && weight.device() == rows.device() &&
                          weight.scalar_type() == rows.scalar_type() && weight.size(1) == rows.size(1),
                      "rows and weight must be matrices of one dtype with as many columns on one device, got ",
                      rows.scalar_type(), " ", rows.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
    const bool recompute = reader.value<bool>("recompute");
    TORCH_CHECK_VALUE(!recompute || rows.size(0) == 2 * pairs, "rows must be the two views of ", pairs, " pairs, got ",
                      rows.sizes());
    const int64_t columns = weight.size(0);
    TORCH_CHECK_VALUE(pairs <= kMostRows / 2 && columns <= kMostRows, "more than ", kMostRows / 2, " pairs or ",
                      kMostRows, " columns: ", pairs, " and ", columns);
    float* products = reader.written_rows("logits", 2 * pairs, columns);
    const int64_t stride = logits.stride(0);
    const LogitMaps maps = reader.logit_maps(pairs);
    const float* const bias[2] = {reader.data<float>("bias", {columns}), reader.data<float>("other_bias", {columns})};
    if (recompute) multiply(rows, weight.t(), logits, false);
    PairRows found;
    for (int view = 0; view < 2; ++view) {
        found.view[view] = {products + view * stride, 2 * stride, bias[view], targets, first,
                            static_cast<int>(columns), maps};
    }
    return found;
}

template <typename Arguments>
void launch_pairs(void (*kernel)(Arguments), const Arguments& arguments, const ArgumentReader& reader) {
    launch_rows(kernel, arguments, reader.tensor("logits"), 2, kPairThreads);
}

Tensors pair_statistics(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("targets").numel();
    PairStatisticsArguments arguments = {};
    arguments.sums = reader.written_rows("sums", 11, pairs);
    arguments.sums_stride = reader.tensor("sums").stride(0);
    arguments.rows = pair_rows(reader, pairs, reader.data<int64_t>("targets", {pairs}), reader.value<int64_t>("first"));
    by_flag(arguments.rows.view[0].maps.capped(), [&](auto capped) {
        launch_pairs(pair_statistics_kernel<kPairThreads, decltype(capped)::value>, arguments, reader);
    });
    return {};
}

Tensors pair_shares(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("totals").dim() == 2 ? reader.tensor("totals").size(1) : 0;
    PairSharesArguments arguments = {};
    arguments.totals = reader.rows("totals", 4, pairs);
    arguments.totals_stride = reader.tensor("totals").stride(0);
    arguments.js_beta = static_cast<float>(reader.value<double>("js_beta"));
    arguments.sums = reader.written_rows("sums", 4, pairs);
    arguments.sums_stride = reader.tensor("sums").stride(0);
    arguments.rows = pair_rows(reader, pairs, nullptr, 0);
    by_flag(arguments.rows.view[0].maps.capped(), [&](auto capped) {
        launch_pairs(pair_shares_kernel<kPairThreads, decltype(capped)::value>, arguments, reader);
    });
    return {};
}

Tensors pair_gradient(const ArgumentReader& reader) {
    const int64_t pairs = reader.tensor("targets").numel();
    const HiddenType type = reader.type("rows");
    PairGradientArguments arguments = {};
    arguments.coefficients = reader.rows("coefficients", 20, pairs);
    arguments.coefficients_stride = reader.tensor("coefficients").stride(0);
    arguments.js_beta = static_cast<float>(reader.value<double>("js_beta"));
    arguments.rows = pair_rows(reader, pairs, reader.data<int64_t>("targets", {pairs}), reader.value<int64_t>("first"));
    by_type(type, [&](auto* element) {
        by_flag(arguments.rows.view[0].maps.capped(), [&](auto capped) {
            launch_pairs(pair_gradient_kernel<std::remove_pointer_t<decltype(element)>, decltype(capped)::value>,
                         arguments, reader);
        });
    });
    return {};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("pair_statistics", by_name<pair_statistics, Values::kClamped>());
    library.impl("pair_shares", by_name<pair_shares, Values::kClamped>());
    library.impl("pair_gradient", by_name<pair_gradient, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
