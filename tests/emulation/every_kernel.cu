// Every kernel with every element type, for nvcc alone: scripts/cuda_resources.py compiles this for each architecture.
#include "../../csrc/cuda/vgpo_loss.cuh"

namespace vgpo {
namespace cuda {

#define EVERY_ELEMENT_TYPE(T)                                                                                \
    template __global__ void visual_prototype_kernel<T>(const __grid_constant__ VisualPrototypeArguments<T>); \
    template __global__ void visual_focus_kernel<T>(const __grid_constant__ VisualFocusArguments<T>);         \
    template __global__ void vgpo_loss_kernel<T>(const __grid_constant__ VgpoLossArguments<T>);

EVERY_ELEMENT_TYPE(float)
EVERY_ELEMENT_TYPE(__half)
EVERY_ELEMENT_TYPE(__nv_bfloat16)

template __global__ void visual_weights_kernel<kThreads>(const __grid_constant__ VisualWeightsArguments);
template __global__ void group_weights_kernel<kThreads>(const __grid_constant__ GroupWeightsArguments);
template __global__ void policy_loss_kernel<kThreads>(const __grid_constant__ PolicyLossArguments);

}  // namespace cuda
}  // namespace vgpo
