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

HeadRows head_rows(const ArgumentReader& reader) {
    const at::Tensor &hidden = reader.tensor("hidden"), &weight = reader.tensor("weight");
    TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && weight.device() == hidden.device() &&
                          weight.scalar_type() == hidden.scalar_type() && weight.size(1) == hidden.size(1),
                      "hidden and weight must be matrices of one dtype with as many columns on one device, got ",
                      hidden.scalar_type(), " ", hidden.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    TORCH_CHECK_VALUE(rows <= kMostRows && columns <= kMostRows, "more than ", kMostRows,
                      " rows or columns: ", rows, " and ", columns);
    return {reader.written_rows("logits", rows, columns),
            reader.tensor("logits").stride(0),
            reader.data<float>("bias", {columns}),
            reader.data<int64_t>("targets", {rows}),
            reader.value<int64_t>("first"),
            static_cast<int>(columns),
            static_cast<float>(1.0 / reader.value<double>("temperature"))};
}

template <typename Arguments>
void launch_rows(void (*kernel)(Arguments), const Arguments& arguments, const at::Tensor& logits) {
    if (logits.size(1) == 0) return;
    launch_blocks(kernel, arguments, dim3(static_cast<unsigned>(logits.size(0))), kHeadThreads, 0, logits.device());
}

void multiply(const at::Tensor& left, const at::Tensor& right, at::Tensor result, bool accumulate) {
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

// The products of a chunk, where its logits will be.
void multiply_chunk(const ArgumentReader& reader) {
    multiply(reader.tensor("hidden"), reader.tensor("weight").t(), reader.tensor("logits"), false);
}

Tensors head_statistics(const ArgumentReader& reader) {
    reader.ignore("keep");  // logits stay in any case
    HeadStatisticsArguments arguments = {};
    arguments.rows = head_rows(reader);
    arguments.statistics = reader.written_rows("statistics", 4, reader.shape("hidden")[0]);
    arguments.statistics_stride = reader.tensor("statistics").stride(0);
    multiply_chunk(reader);
    launch_rows(head_statistics_kernel<kHeadThreads>, arguments, reader.tensor("logits"));
    return {};
}

Tensors head_gradient(const ArgumentReader& reader) {
    const HiddenType type = reader.type("hidden");
    HeadGradientArguments arguments = {};
    arguments.rows = head_rows(reader);
    arguments.coefficients = reader.rows("coefficients", 5, reader.shape("hidden")[0]);
    arguments.coefficients_stride = reader.tensor("coefficients").stride(0);
    if (reader.value<bool>("recompute")) multiply_chunk(reader);
    by_type(type, [&](auto* element) {
        launch_rows(head_gradient_kernel<std::remove_pointer_t<decltype(element)>>, arguments, reader.tensor("logits"));
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
