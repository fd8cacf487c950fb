// The bindings of csrc/cuda with checks, allocation, launches and registration, on the emulated GPU.
#include <cuda_runtime.h>

#include "tensors.h"

// They register for CUDA tensors; here the same functions take CPU tensors, under a namespace of their own.
#define VGPO_HOPPER 1
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, library) _TORCH_LIBRARY_IMPL(vgpo_emulated, CPU, library, C10_UID)

namespace vgpo::cuda {
struct HeadMeanArguments;
struct GroupWeightsArguments;
struct ResponseFactorsArguments;
template <typename T>
struct CausalPrototypeArguments;
template <typename T>
struct InverseNormArguments;
}  // namespace vgpo::cuda
template <>
constexpr bool emulation::kFollowsGrid<vgpo::cuda::HeadMeanArguments> = true;
template <>
constexpr bool emulation::kFollowsGrid<vgpo::cuda::GroupWeightsArguments> = true;
template <>
constexpr bool emulation::kFollowsGrid<vgpo::cuda::ResponseFactorsArguments> = true;
template <typename T>
constexpr bool emulation::kFollowsGrid<vgpo::cuda::CausalPrototypeArguments<T>> = true;
template <typename T>
constexpr bool emulation::kFollowsGrid<vgpo::cuda::InverseNormArguments<T>> = true;

#include "../../csrc/arguments.cpp"
#include "../../csrc/cuda/attention_mass.cu"
#include "../../csrc/cuda/head_tiles.cu"
#include "../../csrc/cuda/linear_divergence.cu"
#include "../../csrc/cuda/linear_logprob.cu"
#include "../../csrc/cuda/policy_loss.cu"
#include "../../csrc/cuda/token_shaping.cu"
#include "../../csrc/cuda/vgpo_loss.cu"
#include "../../csrc/cuda/visual_focus.cu"
#include "../../csrc/cuda/visual_weights.cu"
#include "hopper_plants.h"
#include "plants.h"
#include "register_plants.h"
