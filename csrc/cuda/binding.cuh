// What the bindings share: arguments for kernels of an element type, workspaces, and launches.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "../arguments.h"
#include "policy_loss.cuh"
#include "workspace.h"

namespace vgpo {
namespace cuda {

// ---- arguments ------------------------------------------------------------------------------------------------

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

// Kernels count the rows of a response, and the columns of hidden states, in 32 bits.
inline void check_rows(const Layout& layout) {
    TORCH_CHECK_VALUE(layout.rows <= kMostRows, "more than ", kMostRows, " rows: ", layout.rows);
}

// Hidden states for kernels of element type T; without a response mask.
template <typename T>
FocusInput<T> focus_input(const FocusTensors& given) {
    check_rows(given.layout);
    TORCH_CHECK_VALUE(given.columns <= kMostRows / 4, "more than ", kMostRows / 4, " columns: ", given.columns);
    FocusInput<T> input = {};
    input.hidden = static_cast<const T*>(given.hidden);
    input.strides = given.strides;
    input.dim = static_cast<int>(given.columns);
    input.aligned = rows_are_aligned(input.hidden, input.strides, given.layout, input.dim, given.prototype);
    input.layout = given.layout;
    input.visual_mask = given.visual_mask;
    input.given_prototypes = given.prototype;
    input.prototype_index = given.prototype_index;
    input.index_per_token = given.index_per_token;
    input.num_given = given.num_prototypes;
    input.causal = given.causal && given.prototype == nullptr;
    return input;
}

// Calls `body` with a null pointer of an element type.
template <typename Body>
auto by_type(HiddenType type, Body body) {
    switch (type) {
        case HiddenType::kFloat: return body(static_cast<float*>(nullptr));
        case HiddenType::kHalf: return body(static_cast<__half*>(nullptr));
        default: return body(static_cast<__nv_bfloat16*>(nullptr));
    }
}

// ---- launches -------------------------------------------------------------------------------------------------

// Whether a device runs code for sm_90a.
inline bool is_hopper(c10::Device device) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
    return major == 9 && minor == 0;
}

// The most blocks of a cooperative launch: VGPO_CUDA_BLOCKS, read once, or no limit. Such a launch starts when all of
// its blocks fit at once, so one that fills the device waits until kernels beside it (NCCL's, for one) have ended.
inline int most_blocks() {
    static const int limit = [] {
        const char* given = std::getenv("VGPO_CUDA_BLOCKS");
        if (given == nullptr || *given == '\0') return std::numeric_limits<int>::max();
        char* end = nullptr;
        const long blocks = std::strtol(given, &end, 10);
        TORCH_CHECK_VALUE(*end == '\0' && 1 <= blocks && blocks <= std::numeric_limits<int>::max(),
                          "VGPO_CUDA_BLOCKS must be a number of blocks, 1 or more, got '", given, "'");
        return static_cast<int>(blocks);
    }();
    return limit;
}

// Blocks of a kernel that the current device holds at once. Asked of the driver once per kernel and device; neither
// question synchronises, and both are allowed while a stream is captured.
template <typename Arguments>
int resident_blocks(void (*kernel)(Arguments)) {
    static std::mutex mutex;
    static std::map<std::pair<void (*)(Arguments), int>, int> known;
    int device = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    int& blocks = known[{kernel, device}];
    if (blocks == 0) {
        int per_multiprocessor = 0, multiprocessors = 0;
        C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
        blocks = per_multiprocessor * multiprocessors;
    }
    return blocks;
}

// Launches a kernel on the current stream, cooperatively, with as many blocks as have work and fit at once.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t useful_blocks, c10::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    const int64_t most = std::min(resident_blocks(kernel), most_blocks());
    const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min(useful_blocks, most)));
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    C10_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), parameters, 0,
                                               c10::cuda::getCurrentCUDAStream(device.index())));
}

// Allocates the workspace of a kernel's arguments.
template <typename Arguments>
at::Tensor allocate_workspace(Arguments& arguments, c10::Device device) {
    Arena counter(nullptr);
    bind(arguments, counter);
    at::Tensor memory =
        at::empty({static_cast<int64_t>(counter.bytes())}, at::TensorOptions().dtype(at::kByte).device(device));
    Arena arena(memory.mutable_data_ptr());
    bind(arguments, arena);
    return memory;
}

// Launches a kernel with a workspace.
template <typename Arguments>
void launch_with_workspace(void (*kernel)(Arguments), Arguments& arguments, c10::Device device) {
    // Freed when this function returns, and reused by later work of the same stream at the earliest.
    const at::Tensor memory = allocate_workspace(arguments, device);
    launch(kernel, arguments, useful_blocks(arguments), device);
}

// A number of blocks as a grid takes it; kernels go over what is left in further rounds.
inline unsigned grid_blocks(int64_t useful_blocks) {
    return static_cast<unsigned>(std::min<int64_t>(useful_blocks, std::numeric_limits<int32_t>::max()));
}

// Launches a kernel of independent blocks on the current stream; none if the grid is empty.
template <typename Arguments>
void launch_blocks(void (*kernel)(Arguments), const Arguments& arguments, dim3 grid, int threads, int shared_bytes,
                   c10::Device device) {
    constexpr int kFreeSharedBytes = 48 * 1024;  // a kernel must ask for more
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const c10::cuda::CUDAGuard guard(device);
    if (shared_bytes > kFreeSharedBytes) {
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    C10_CUDA_CHECK(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters,
                                    static_cast<size_t>(shared_bytes),
                                    c10::cuda::getCurrentCUDAStream(device.index())));
}

}  // namespace cuda
}  // namespace vgpo
