// Tensors in guarded memory: copies of a binding's arguments, and whatever it allocates during a call.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <memory>
#include <sstream>
#include <string>

#include "runtime.h"

namespace emulation {

class GuardedAllocator final : public c10::Allocator {
   public:
    c10::DataPtr allocate(size_t bytes) override {
        auto* buffer = new GuardedBuffer(name, bytes, guarding().side);
        const auto free = [](void* context) { delete static_cast<GuardedBuffer*>(context); };
        return {buffer->data(), buffer, free, c10::Device(c10::kCPU)};
    }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

    static constexpr const char* kUnnamed = "a temporary tensor";
    std::string name = kUnnamed;  // of the next buffer
};

inline GuardedAllocator& guarded_allocator() {
    static GuardedAllocator allocator;
    return allocator;
}

// A copy of a tensor, a strided one's with everything between its elements. It says that it is whole where its last
// elements are missing.
inline at::Tensor guarded_copy(const at::Tensor& given, std::string name, bool writable, int64_t guard,
                               int64_t missing) {
    int64_t span = given.numel() > 0 ? 1 : 0;
    for (int64_t i = 0; span > 0 && i < given.dim(); ++i) span += (given.size(i) - 1) * given.stride(i);
    const size_t bytes = static_cast<size_t>(span - missing) * given.element_size();
    auto buffer = std::make_shared<GuardedBuffer>(std::move(name), bytes, static_cast<Guard>(guard));
    if (bytes > 0) std::memcpy(buffer->data(), given.const_data_ptr(), bytes);
    if (!writable) buffer->protect();
    return at::from_blob(buffer->data(), given.sizes(), given.strides(), [buffer](void*) {}, given.options());
}

// Until end_call, launches are as chosen, and what is allocated is guarded.
inline void begin_call(int64_t blocks, int64_t threads, int64_t order, int64_t seed, int64_t guard, bool hopper) {
    choice() = {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<Order>(order),
                static_cast<uint64_t>(seed), hopper};
    guarding().side = static_cast<Guard>(guard);
    guarding().apart = blocks > 0;
    launched().clear();
    c10::SetCPUAllocator(&guarded_allocator(), 255);
}

inline void end_call() {
    choice() = {};
    guarding().apart = false;
    guarding().arrays.clear();
    c10::SetCPUAllocator(c10::GetDefaultCPUAllocator(), 255);
}

}  // namespace emulation

// What `at` means in the project's namespace: torch's, but for these functions.
namespace vgpo::at {

using namespace ::at;

// Faults name a tensor by the line that allocates it.
inline Tensor empty(IntArrayRef sizes, const TensorOptions& options, EMULATION_SITE) {
    std::ostringstream name;
    name << "the tensor of shape " << sizes << " from " << c10::detail::StripBasename(file) << ":" << line;
    emulation::guarded_allocator().name = name.str();
    Tensor result = ::at::empty(sizes, options);
    emulation::guarded_allocator().name = emulation::GuardedAllocator::kUnnamed;
    return result;
}

// CUDA tensors have products of 16-bit matrices with fp32 results; these are of CPU tensors.
inline Tensor mm(const Tensor& left, const Tensor& right, ScalarType type) {
    return ::at::mm(left.to(type), right.to(type));
}
inline Tensor& mm_out(Tensor& result, const Tensor& left, const Tensor& right, ScalarType type) {
    return ::at::mm_out(result, left.to(type), right.to(type));
}
inline Tensor& addmm_out(Tensor& result, const Tensor& self, const Tensor& left, const Tensor& right, ScalarType type) {
    return ::at::addmm_out(result, self, left.to(type), right.to(type));
}
inline Tensor& addmm_out(Tensor& result, const Tensor& self, const Tensor& left, const Tensor& right, double beta) {
    return ::at::addmm_out(result, self, left, right, beta);
}

}  // namespace vgpo::at

TORCH_LIBRARY_FRAGMENT(vgpo_emulated, library) {
    library.def("guarded_copy(Tensor given, str name, bool writable, int guard, int missing) -> Tensor",
                &emulation::guarded_copy);
    library.def("begin_call(int blocks, int threads, int order, int seed, int guard, bool hopper) -> ()",
                &emulation::begin_call);
    library.def("end_call() -> ()", &emulation::end_call);
    library.def("launched() -> str[]", [] { return emulation::launched(); });
}
