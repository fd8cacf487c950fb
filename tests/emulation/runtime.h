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
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaStream_t {};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
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
    bool hopper = false;  // of the device, which otherwise is an older one
};

inline Choice& choice() {
    static Choice current;
    return current;
}

// Kernels that the call has launched, by name.
inline std::vector<std::string>& launched() {
    static std::vector<std::string> names;
    return names;
}

// Cooperative kernels are right for any number of blocks and threads, those in clusters for any number of clusters. Of
// the others, these are right for any number of blocks.
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
    return name.substr(name.rfind(':', name.find('<')) + 1);
}

template <typename Arguments>
cudaError_t run_kernel(void (*kernel)(Arguments), const dim3& grid, const dim3& block, void** parameters,
                       size_t shared_bytes, bool cooperative, unsigned cluster = 1) {
    Launch shape;
    shape.grid = grid;
    shape.block = block;
    shape.cluster = cluster;
    if (choice().blocks > 0) {
        if (cooperative || kFollowsGrid<Arguments>) shape.grid.x = choice().blocks;
        if (cooperative) shape.block.x = choice().threads;
        if (cluster > 1) shape.grid.x = (choice().blocks + cluster - 1) / cluster * cluster;
    }
    shape.dynamic_shared_bytes = shared_bytes;
    shape.cooperative = cooperative;
    shape.order = choice().order;
    shape.seed = choice().seed;
    launched().push_back(name_of(reinterpret_cast<const void*>(kernel)));
    const std::string error = launch(shape, [&] { kernel(*static_cast<const Arguments*>(parameters[0])); });
    TORCH_CHECK(error.empty(), "the emulated GPU: ", launched().back(), ": ", error);
    return cudaSuccess;
}

}  // namespace emulation

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = 2; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; break;
        case cudaDevAttrComputeCapabilityMajor: *value = emulation::choice().hopper ? 9 : 8; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    }
    return cudaSuccess;
}

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

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i) cluster *= config->attrs[i].val.clusterDim.x;
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    return emulation::run_kernel(kernel, config->gridDim, config->blockDim, parameters, config->dynamicSmemBytes, false,
                                 cluster);
}

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;

// The driver has one function.
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    const bool known = std::string(name) == "cuTensorMapEncodeTiled";
    *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

#define C10_CUDA_CHECK(expression) TORCH_CHECK((expression) == cudaSuccess, #expression)

namespace c10::cuda {

struct CUDAGuard {
    explicit CUDAGuard(c10::Device) {}
};

inline cudaStream_t getCurrentCUDAStream(c10::DeviceIndex) { return {}; }

}  // namespace c10::cuda
