// The arithmetic of an LM head's chunks on CUDA: products by cuBLAS through ATen, epilogues, registration.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>
#include <torch/version.h>

#include "binding.cuh"
#include "linear_logprob.cuh"

namespace vgpo {
namespace cuda {
namespace {

// The overloads of mm and addmm with a dtype of the result are as old as the oldest torch supported. Until 2.9 that of
// addmm wants self in the dtype of the matrices; since 2.10 self may have the dtype of the result, and so be the result.
constexpr bool kAccumulates = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10;

HeadRows head_rows(const ArgumentReader& reader, const at::Tensor& hidden, const at::Tensor& weight,
                   const OptionalTensor& bias, const at::Tensor& targets, int64_t first, double temperature,
                   const at::Tensor& logits) {
    TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && weight.device() == hidden.device() &&
                          weight.scalar_type() == hidden.scalar_type() && weight.size(1) == hidden.size(1),
                      "hidden and weight must be matrices of one dtype with as many columns on one device, got ",
                      hidden.scalar_type(), " ", hidden.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    TORCH_CHECK_VALUE(rows <= kMostRows && columns <= kMostRows, "more than ", kMostRows,
                      " rows or columns: ", logits.sizes());
    return {reader.rows("logits", logits, rows, columns),
            logits.stride(0),
            reader.tensor<float>("bias", bias, {columns}),
            reader.tensor<int64_t>("targets", targets, {rows}),
            first,
            static_cast<int>(columns),
            static_cast<float>(1.0 / temperature)};
}

template <typename Arguments>
void launch_rows(void (*kernel)(Arguments), const Arguments& arguments, const at::Tensor& logits) {
    if (logits.size(1) == 0) return;
    launch_blocks(kernel, arguments, dim3(static_cast<unsigned>(logits.size(0))), kHeadThreads, 0, logits.device());
}

void head_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& result, bool accumulate) {
    TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0) &&
                          left.scalar_type() == right.scalar_type(),
                      "left and right must be matrices of one dtype that can be multiplied, got ", left.scalar_type(),
                      " ", left.sizes(), " and ", right.scalar_type(), " ", right.sizes());
    ArgumentReader(left.device(), Values::kClamped).rows("result", result, left.size(0), right.size(1));
    if (left.scalar_type() == at::kFloat) {
        at::addmm_out(result, result, left, right, accumulate ? 1.0 : 0.0);
    } else if (!accumulate) {
        at::mm_out(result, left, right, at::kFloat);
    } else if (kAccumulates) {
        at::addmm_out(result, result, left, right, at::kFloat);
    } else {
        result.add_(at::mm(left, right, at::kFloat));
    }
}

void head_statistics(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                     const at::Tensor& targets, int64_t first, double temperature, at::Tensor& statistics,
                     at::Tensor& logits, bool /*keep: they stay in any case*/) {
    const ArgumentReader reader(hidden.device(), Values::kClamped);
    HeadStatisticsArguments arguments = {};
    arguments.rows = head_rows(reader, hidden, weight, bias, targets, first, temperature, logits);
    arguments.statistics = reader.rows("statistics", statistics, 4, hidden.size(0));
    arguments.statistics_stride = statistics.stride(0);
    head_product(hidden, weight.t(), logits, false);
    launch_rows(head_statistics_kernel<kHeadThreads>, arguments, logits);
}

void head_gradient(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                   const at::Tensor& targets, int64_t first, double temperature, const at::Tensor& coefficients,
                   at::Tensor& logits, bool recompute) {
    const ArgumentReader reader(hidden.device(), Values::kClamped);
    const HiddenType type = reader.type("hidden", hidden);
    HeadGradientArguments arguments = {};
    arguments.rows = head_rows(reader, hidden, weight, bias, targets, first, temperature, logits);
    arguments.coefficients = reader.rows("coefficients", coefficients, 5, hidden.size(0));
    arguments.coefficients_stride = coefficients.stride(0);
    if (recompute) head_product(hidden, weight.t(), logits, false);
    by_type(type, [&](auto* element) {
        launch_rows(head_gradient_kernel<std::remove_pointer_t<decltype(element)>>, arguments, logits);
    });
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("head_statistics", &vgpo::cuda::head_statistics);
    library.impl("head_gradient", &vgpo::cuda::head_gradient);
    library.impl("head_product", &vgpo::cuda::head_product);
}
