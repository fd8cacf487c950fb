// A product of a warpgroup with its left operand in registers and its right one copied by threads, right and with one
// planted mistake each.
#pragma once

#include <map>
#include <string>

#include "../../csrc/cuda/attention_tiles.cuh"
#include "../../csrc/cuda/hopper.cuh"
#include "hopper_plants.h"
#include "tensors.h"

namespace {

enum class RegisterMistake { kNone, kNotPublished, kSumsTooEarly, kSwappedHalves };

struct RegisterArguments {
    const __nv_bfloat16 *left, *right;  // [64, 64]
    float* out;                         // [64, 64]
};

template <RegisterMistake kMistake>
void multiply_registers(RegisterArguments arguments) {
    using Bf16 = __nv_bfloat16;
    constexpr int kSize = 64;
    EMULATED_DYNAMIC_SHARED(unsigned char, shared);
    unsigned char* box = shared + (1024 - gpu::shared_address(shared) % 1024) % 1024;
    const gpu::TileShape<Bf16, kSize, true> shape(kSize);
    gpu::copy_even_rows<kSize>(arguments.right, shape, kSize, box);
    gpu::wait_for_copies();
    if (kMistake != RegisterMistake::kNotPublished) gpu::publish_writes();
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float sums[8][4] = {};
    gpu::begin_products();
    for (int step = 0; step < kSize / 16; ++step) {
        unsigned words[4];
        for (int i = 0; i < 4; ++i) {
            const int upper = kMistake == RegisterMistake::kSwappedHalves ? i / 2 : i % 2;
            const int later = kMistake == RegisterMistake::kSwappedHalves ? i % 2 : i / 2;
            std::memcpy(&words[i], arguments.left + (row + 8 * upper) * kSize + 16 * step + 8 * later + column, 4);
        }
        gpu::multiply_group(sums, words, gpu::operand_of(box) + static_cast<unsigned>(step) * gpu::kOperandStep,
                            step > 0, static_cast<const Bf16*>(nullptr));
    }
    gpu::end_products();
    if (kMistake != RegisterMistake::kSumsTooEarly) gpu::wait_for_products<0>();
    gpu::take_sums(sums);
    for (int j = 0; j < 8; ++j) {
        for (int c = 0; c < 4; ++c) arguments.out[(row + c / 2 * 8) * kSize + 8 * j + column + c % 2] = sums[j][c];
    }
    gpu::wait_for_products<0>();
}

#define PLANT(name, mistake) {name, multiply_registers<RegisterMistake::mistake>}
const std::map<std::string, void (*)(RegisterArguments)> kRegisterPlants = {
    PLANT("right", kNone),
    PLANT("copies are not published", kNotPublished),
    PLANT("sums are read before the wait", kSumsTooEarly),
    PLANT("halves of the left operand change places", kSwappedHalves),
};
#undef PLANT

// left @ right^T by the kernel of this name, of matrices of 64 rows of 64 bf16 numbers.
inline at::Tensor run_register_plant(const at::Tensor& left, const at::Tensor& right, const std::string& name) {
    TORCH_CHECK(left.is_contiguous() && right.is_contiguous() && left.numel() == 64 * 64 && right.numel() == 64 * 64);
    const at::Tensor out = at::empty({64, 64}, left.options().dtype(at::kFloat));
    RegisterArguments arguments{static_cast<const __nv_bfloat16*>(left.const_data_ptr()),
                                static_cast<const __nv_bfloat16*>(right.const_data_ptr()),
                                out.mutable_data_ptr<float>()};
    void* parameters[] = {&arguments};
    emulation::run_kernel(kRegisterPlants.at(name), dim3(1), dim3(gpu::kWarpgroupThreads), parameters,
                          64 * gpu::kBoxBytes + 1024, false);
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vgpo_emulated, library) {
    library.def("run_register_plant(Tensor left, Tensor right, str name) -> Tensor");
    library.impl("run_register_plant", c10::DispatchKey::CPU, &run_register_plant);
}
