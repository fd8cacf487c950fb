// The CUDA runtime and torch's wrappers of it, as far as the bindings of csrc/cuda call them, for the emulated GPU. Its
// memory is the CPU's, so that bindings take CPU tensors; a launch has run when it returns.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "cuda_emulation.h"

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaStream_t {};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 227 * 1024;
    return cudaSuccess;
}

template <typename Arguments>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Arguments), int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

template <typename Arguments>
cudaError_t cudaFuncSetAttribute(void (*)(Arguments), cudaFuncAttribute, int) {
    return cudaSuccess;
}

namespace emulation {

// What a test chooses about the launches of a call.
struct Choice {
    unsigned blocks = 0, threads = 0;  // 0 blocks: the binding's numbers of both
    Order order = Order::kForward;
    uint64_t seed = 0;
};

inline Choice& choice() {
    static Choice current;
    return current;
}

// Cooperative kernels are right for any number of blocks and threads. Of the others, these are right for any number of
// blocks.
template <typename Arguments>
constexpr bool kFollowsGrid = false;

// "policy_loss_kernel<512>"
inline std::string name_of(const void* kernel) {
    Dl_info found{};
    if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) return "a kernel";
    char* readable = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
    std::string name = readable == nullptr ? found.dli_sname : readable;
    std::free(readable);
    name = name.substr(0, name.find('('));
    return name.substr(name.rfind(':') + 1);
}

template <typename Arguments>
cudaError_t run_kernel(void (*kernel)(Arguments), const dim3& grid, const dim3& block, void** parameters,
                       size_t shared_bytes, bool cooperative) {
    Launch shape;
    shape.grid = grid;
    shape.block = block;
    if (choice().blocks > 0) {
        if (cooperative || kFollowsGrid<Arguments>) shape.grid.x = choice().blocks;
        if (cooperative) shape.block.x = choice().threads;
    }
    shape.dynamic_shared_bytes = shared_bytes;
    shape.cooperative = cooperative;
    shape.order = choice().order;
    shape.seed = choice().seed;
    const std::string error = launch(shape, [&] { kernel(*static_cast<const Arguments*>(parameters[0])); });
    TORCH_CHECK(error.empty(), "the emulated GPU: ", name_of(reinterpret_cast<const void*>(kernel)), ": ", error);
    return cudaSuccess;
}

}  // namespace emulation

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), const dim3& grid, const dim3& block, void** parameters,
                             size_t shared_bytes, cudaStream_t) {
    return emulation::run_kernel(kernel, grid, block, parameters, shared_bytes, false);
}

template <typename Arguments>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Arguments), const dim3& grid, const dim3& block,
                                        void** parameters, size_t shared_bytes, cudaStream_t) {
    return emulation::run_kernel(kernel, grid, block, parameters, shared_bytes, true);
}

#define C10_CUDA_CHECK(expression) TORCH_CHECK((expression) == cudaSuccess, #expression)

namespace c10::cuda {

struct CUDAGuard {
    explicit CUDAGuard(c10::Device) {}
};

inline cudaStream_t getCurrentCUDAStream(c10::DeviceIndex) { return {}; }

}  // namespace c10::cuda
