// What the bindings share: checked tensors as kernel arguments, workspaces, and launches.
//
// The public functions have checked dtypes and shapes; what is asked again here keeps a direct call of an operator from
// reading outside its arguments. Values on the device are not looked at, which would synchronise: boundaries and
// indices are clamped by the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>

#include "policy_loss.cuh"
#include "workspace.h"

namespace vgpo {
namespace cuda {

using OptionalTensor = std::optional<at::Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------

// The data of a contiguous tensor of type T and the given shape on `device`.
template <typename T>
const T* checked(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, c10::Device device) {
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK_VALUE(tensor.device() == device && tensor.scalar_type() == kType && tensor.is_contiguous() &&
                          tensor.sizes() == shape,
                      name, " must be a contiguous ", kType, " tensor of shape ", shape, " on ", device, ", got ",
                      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
    return tensor.const_data_ptr<T>();
}

template <typename T>
const T* checked(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, c10::Device device) {
    return tensor.has_value() ? checked<T>(name, *tensor, shape, device) : nullptr;
}

// The layout of response arrays shaped as `response_mask`, with `rows` rows a response of a padded batch.
inline Layout checked_layout(const at::Tensor& mask, const OptionalTensor& cu_seqlens, int64_t rows) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(rows <= kMost, "more than ", kMost, " rows: ", rows);
    if (!cu_seqlens.has_value()) {
        TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(1) <= rows, "masks must have shape [B, T] with T <= ", rows,
                          " without cu_seqlens, got ", mask.sizes());
        return Layout::padded(mask.size(0), mask.size(1), rows);
    }
    TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == rows, "masks must have shape [", rows,
                      "] with cu_seqlens, got ", mask.sizes());
    TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "cu_seqlens must have shape [B + 1], got ",
                      cu_seqlens->sizes());
    const int64_t batch = cu_seqlens->size(0) - 1;
    return Layout::packed(checked<int64_t>("cu_seqlens", *cu_seqlens, {batch + 1}, mask.device()), batch, rows);
}

inline WeightsConfig checked_config(at::ArrayRef<double> fields) {
    TORCH_CHECK_VALUE(fields.size() == kConfigFields, "config must have ", kConfigFields, " numbers, got ",
                      fields.size());
    return WeightsConfig::from(fields.data());
}

inline LossOptions checked_options(at::ArrayRef<double> fields) {
    TORCH_CHECK_VALUE(fields.size() == kOptionFields, "options must have ", kOptionFields, " numbers, got ",
                      fields.size());
    return LossOptions::from(fields.data());
}

inline void check_hidden(const at::Tensor& hidden, bool packed) {
    TORCH_CHECK_VALUE(hidden.is_cuda() && hidden.dim() == (packed ? 2 : 3) && hidden.stride(-1) == 1 &&
                          0 < hidden.size(-1) && hidden.size(-1) <= std::numeric_limits<int32_t>::max() / 4,
                      "hidden must be a CUDA tensor of shape ", packed ? "[N, D]" : "[B, S, D]",
                      " with a contiguous last dimension, got ", hidden.sizes(), " on ", hidden.device());
}

// Everything of the visual focus but the response mask. `layout` is that of the responses.
template <typename T>
FocusInput<T> checked_focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const Layout& layout,
                            const OptionalTensor& prototype, const OptionalTensor& prototype_index) {
    const bool packed = layout.cu_seqlens != nullptr;
    TORCH_CHECK_VALUE(hidden.size(0) == (packed ? layout.rows : layout.batch), "hidden must have ",
                      packed ? layout.rows : layout.batch, packed ? " rows" : " responses", ", got ", hidden.sizes());
    TORCH_CHECK_VALUE(visual_mask.has_value() || prototype.has_value(), "visual_mask is None, which needs prototype");
    FocusInput<T> input = {};
    input.hidden = static_cast<const T*>(hidden.const_data_ptr());
    input.strides = {hidden.stride(0), hidden.stride(packed ? 0 : 1)};
    input.dim = static_cast<int>(hidden.size(-1));
    input.layout = layout;
    input.visual_mask =
        checked<bool>("visual_mask", visual_mask, hidden.sizes().slice(0, hidden.dim() - 1), hidden.device());
    if (prototype.has_value()) {
        input.num_given = prototype_index.has_value() ? prototype->size(0) : layout.batch;
        input.given_prototypes = checked<float>("prototype", *prototype, {input.num_given, input.dim}, hidden.device());
        input.prototype_index = checked<int64_t>("prototype_index", prototype_index, {layout.batch}, hidden.device());
    }
    input.aligned = rows_are_aligned(input.hidden, input.strides, input.dim, input.given_prototypes);
    return input;
}

// A vector of length B is one entry a response, also in a packed batch of as many tokens.
inline SpreadInput checked_spread(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, int64_t batch,
                                  c10::Device device) {
    const bool per_response = tensor.dim() == 1 && tensor.size(0) == batch;
    return {checked<float>(name, tensor, per_response ? at::IntArrayRef(batch) : shape, device), !per_response};
}

inline PolicyInput checked_policy(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                                  const at::Tensor& response_mask, const Layout& layout,
                                  const OptionalTensor& ref_logp, const OptionalTensor& entropy,
                                  const OptionalTensor& importance_weights, const OptionalTensor& num_tokens,
                                  const OptionalTensor& num_sequences, at::ArrayRef<double> options) {
    const at::IntArrayRef shape = response_mask.sizes();
    const c10::Device device = response_mask.device();
    PolicyInput input = {};
    input.layout = layout;
    input.logp = checked<float>("logp", logp, shape, device);
    input.old_logp = checked<float>("old_logp", old_logp, shape, device);
    input.advantages = checked_spread("advantages", advantages, shape, layout.batch, device);
    input.response_mask = checked<bool>("response_mask", response_mask, shape, device);
    input.ref_logp = checked<float>("ref_logp", ref_logp, shape, device);
    input.entropy = checked<float>("entropy", entropy, shape, device);
    if (importance_weights.has_value()) {
        input.importance = checked_spread("importance_weights", *importance_weights, shape, layout.batch, device);
    }
    input.num_tokens = checked<float>("num_tokens", num_tokens, {}, device);
    input.num_sequences = checked<float>("num_sequences", num_sequences, {}, device);
    input.options = checked_options(options);
    return input;
}

// ---- results --------------------------------------------------------------------------------------------------

// What a loss operator returns: loss, its gradients by logp and (no elements without entropy) entropy, metrics.
using LossTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline LossTensors empty_loss(const at::Tensor& logp, const OptionalTensor& entropy, int64_t metrics) {
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, logp.options()); };
    return {empty({}), empty(logp.sizes()), entropy.has_value() ? empty(logp.sizes()) : empty({0}), empty({metrics})};
}

inline PolicyOutput loss_output(const LossTensors& tensors, const OptionalTensor& entropy) {
    const auto& [loss, grad_logp, grad_entropy, metrics] = tensors;
    return {loss.mutable_data_ptr<float>(), grad_logp.mutable_data_ptr<float>(),
            entropy.has_value() ? grad_entropy.mutable_data_ptr<float>() : nullptr, metrics.mutable_data_ptr<float>()};
}

// ---- launches -------------------------------------------------------------------------------------------------

// Blocks of a kernel that the current device holds at once. Asked of the driver once a device; neither question
// synchronises, and both are allowed while a stream is captured.
template <typename Arguments>
int resident_blocks(void (*kernel)(Arguments)) {
    constexpr int kMostDevices = 64;
    static std::atomic<int> known[kMostDevices] = {};
    int device = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    TORCH_CHECK(device < kMostDevices, "more than ", kMostDevices, " devices");
    int blocks = known[device].load(std::memory_order_relaxed);
    if (blocks == 0) {
        int per_multiprocessor = 0, multiprocessors = 0;
        C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
        blocks = per_multiprocessor * multiprocessors;
        known[device].store(blocks, std::memory_order_relaxed);
    }
    return blocks;
}

// Launches a kernel on the current stream, cooperatively, with as many blocks as have work and fit at once.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t useful_blocks, c10::Device device) {
    const int64_t resident = resident_blocks(kernel);
    const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min(useful_blocks, resident)));
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    C10_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads),
                                               parameters, 0, c10::cuda::getCurrentCUDAStream(device.index())));
}

// Allocates the workspace of a kernel's arguments, and launches it.
template <typename Arguments>
void launch_with_workspace(void (*kernel)(Arguments), Arguments& arguments, c10::Device device) {
    Arena counter(nullptr);
    bind(arguments, counter);
    // Freed when this function returns, and reused by later work of the same stream at the earliest.
    const at::Tensor memory =
        at::empty({static_cast<int64_t>(counter.bytes())}, at::TensorOptions().dtype(at::kByte).device(device));
    Arena arena(memory.mutable_data_ptr());
    bind(arguments, arena);
    launch(kernel, arguments, useful_blocks(arguments), device);
}

// Launches a kernel of independent blocks on the current stream; none if the grid is empty.
template <typename Arguments>
void launch_blocks(void (*kernel)(Arguments), const Arguments& arguments, dim3 grid, int threads, int shared_bytes,
                   c10::Device device) {
    constexpr int kFreeSharedBytes = 48 * 1024;  // a kernel must ask for more
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > kFreeSharedBytes) {
        C10_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    C10_CUDA_CHECK(cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(threads)), parameters,
                                    static_cast<size_t>(shared_bytes),
                                    c10::cuda::getCurrentCUDAStream(device.index())));
}

// Calls `body` with a null pointer of the tensor's element type.
template <typename Body>
auto by_dtype(const at::Tensor& tensor, Body body, const char* name = "hidden") {
    switch (tensor.scalar_type()) {
        case at::kFloat: return body(static_cast<float*>(nullptr));
        case at::kHalf: return body(static_cast<__half*>(nullptr));
        case at::kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
        default: TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
    }
}

}  // namespace cuda
}  // namespace vgpo
