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

// The overloads of mm and addmm with a dtype of the result are as old as the oldest torch that serves. Until 2.9 that of
// addmm wants self in the dtype of the matrices; since 2.10 self may have the dtype of the result, and so be the result.
constexpr bool kAccumulates = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10;

// A matrix of fp32 with contiguous rows.
float* checked_rows(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, c10::Device device) {
    TORCH_CHECK_VALUE(tensor.device() == device && tensor.scalar_type() == at::kFloat && tensor.dim() == 2 &&
                          tensor.size(0) == rows && tensor.size(1) == columns &&
                          (tensor.stride(1) == 1 || columns == 1),
                      name, " must be fp32 [", rows, ", ", columns, "] with contiguous rows on ", device, ", got ",
                      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
    return tensor.mutable_data_ptr<float>();
}

HeadRows checked_head(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                      const at::Tensor& targets, int64_t first, double temperature, const at::Tensor& logits) {
    TORCH_CHECK_VALUE(hidden.is_cuda() && hidden.dim() == 2 && weight.dim() == 2 &&
                          weight.device() == hidden.device() && weight.scalar_type() == hidden.scalar_type() &&
                          weight.size(1) == hidden.size(1),
                      "hidden and weight must be matrices of one dtype with as many columns on one GPU, got ",
                      hidden.scalar_type(), " ", hidden.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
    const c10::Device device = hidden.device();
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(rows <= kMost && columns <= kMost, "more than ", kMost, " rows or columns: ", logits.sizes());
    return {checked_rows("logits", logits, rows, columns, device),
            logits.stride(0),
            checked<float>("bias", bias, {columns}, device),
            checked<int64_t>("targets", targets, {rows}, device),
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
    checked_rows("result", result, left.size(0), right.size(1), left.device());
    const c10::cuda::CUDAGuard guard(left.device());
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
    const c10::cuda::CUDAGuard guard(hidden.device());
    HeadStatisticsArguments arguments = {};
    arguments.rows = checked_head(hidden, weight, bias, targets, first, temperature, logits);
    arguments.statistics = checked_rows("statistics", statistics, 4, hidden.size(0), hidden.device());
    arguments.statistics_stride = statistics.stride(0);
    head_product(hidden, weight.t(), logits, false);
    launch_rows(head_statistics_kernel<kHeadThreads>, arguments, logits);
}

void head_gradient(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                   const at::Tensor& targets, int64_t first, double temperature, const at::Tensor& coefficients,
                   at::Tensor& logits, bool recompute) {
    const c10::cuda::CUDAGuard guard(hidden.device());
    HeadGradientArguments arguments = {};
    arguments.rows = checked_head(hidden, weight, bias, targets, first, temperature, logits);
    arguments.coefficients = checked_rows("coefficients", coefficients, 5, hidden.size(0), hidden.device());
    arguments.coefficients_stride = coefficients.stride(0);
    if (recompute) head_product(hidden, weight.t(), logits, false);
    by_dtype(hidden, [&](auto* type) {
        launch_rows(head_gradient_kernel<std::remove_pointer_t<decltype(type)>>, arguments, logits);
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
