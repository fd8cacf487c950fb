// What the bindings of LM heads share: matrix products by cuBLAS through ATen, and launches of their epilogues.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <atomic>
#include <type_traits>

#include "binding.cuh"
#include "linear_logprob.cuh"

namespace vgpo {
namespace cuda {

// Calls body(std::bool_constant).
template <typename Body>
void by_flag(bool flag, Body body) {
    if (flag) body(std::true_type());
    else body(std::false_type());
}

// Launches an epilogue, a block for so many rows of logits.
template <typename Arguments>
void launch_rows(void (*kernel)(Arguments), const Arguments& arguments, const at::Tensor& logits, int64_t rows = 1,
                 int threads = kHeadThreads) {
    if (logits.size(1) == 0) return;
    const auto blocks = static_cast<unsigned>(logits.size(0) / rows);
    launch_blocks(kernel, arguments, dim3(blocks), threads, 0, logits.device());
}

// Adds the product of 16-bit matrices to an fp32 matrix where it lies, or returns false with nothing done.
//
// Torch 2.8 has the overload with a dtype of the result, but its releases differ in whether what is added to may have
// that dtype or must have that of the matrices. They check before they compute, so the first call finds out.
inline bool add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor result) {
    static std::atomic<bool> refused{false};
    // A single row may be taken for a bias, which a kernel would read while it writes the row.
    if (result.size(0) == 1 || refused.load(std::memory_order_relaxed)) return false;
    try {
        at::addmm_out(result, result, left, right, at::kFloat);
        return true;
    } catch (const c10::OutOfMemoryError&) {
        throw;
    } catch (const c10::Error&) {  // where the product itself fails, its next call says why
        refused.store(true, std::memory_order_relaxed);
        return false;
    }
}

// Writes left @ right to `result` in fp32, or adds it.
inline void multiply(const at::Tensor& left, const at::Tensor& right, at::Tensor result, bool accumulate) {
    if (left.scalar_type() == at::kFloat) {
        at::addmm_out(result, result, left, right, accumulate ? 1.0 : 0.0);
    } else if (!accumulate) {
        at::mm_out(result, left, right, at::kFloat);
    } else if (!add_product(left, right, result)) {
        result.add_(at::mm(left, right, at::kFloat));
    }
}

}  // namespace cuda
}  // namespace vgpo
