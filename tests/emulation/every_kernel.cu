// Every kernel with every element type, for nvcc alone: scripts/cuda_resources.py compiles this for each architecture.
#include "../../csrc/cuda/attention_gradients.cuh"
#include "../../csrc/cuda/attention_warpgroup.cuh"
#include "../../csrc/cuda/causal_prototype.cuh"
#include "../../csrc/cuda/head_tiles.cuh"
#include "../../csrc/cuda/linear_divergence.cuh"
#include "../../csrc/cuda/token_shaping.cuh"
#include "../../csrc/cuda/vgpo_loss.cuh"

namespace vgpo {
namespace cuda {

#define EVERY_ELEMENT_TYPE(T) \
    template __global__ void visual_prototype_kernel<T>(const __grid_constant__ VisualPrototypeArguments<T>); \
    template __global__ void causal_prototype_kernel<T>(const __grid_constant__ CausalPrototypeArguments<T>); \
    template __global__ void visual_focus_kernel<T>(const __grid_constant__ VisualFocusArguments<T>); \
    template __global__ void inverse_norm_kernel<T>(const __grid_constant__ InverseNormArguments<T>); \
    template __global__ void unit_prototype_kernel<T>(const __grid_constant__ VisualPrototypeArguments<T>); \
    template __global__ void causal_unit_prototype_kernel<T>(const __grid_constant__ CausalPrototypeArguments<T>); \
    template __global__ void unit_focus_kernel<T>(const __grid_constant__ VisualFocusArguments<T>); \
    template __global__ void vgpo_loss_kernel<T>(const __grid_constant__ VgpoLossArguments<T>); \
    template __global__ void head_gradient_kernel<T, false>(const __grid_constant__ HeadGradientArguments); \
    template __global__ void head_gradient_kernel<T, true>(const __grid_constant__ HeadGradientArguments); \
    template __global__ void pair_gradient_kernel<T, false>(const __grid_constant__ PairGradientArguments); \
    template __global__ void pair_gradient_kernel<T, true>(const __grid_constant__ PairGradientArguments);

// The sizes of heads with kernels of their own, and 0 for any other.
#define EVERY_HEAD_SIZE(T, size) \
    template __global__ void attention_mass_kernel<T, size>(const __grid_constant__ AttentionMassArguments<T>); \
    template __global__ void attention_heatmap_kernel<T, size>(const __grid_constant__ AttentionHeatmapArguments<T>); \
    EVERY_GRADIENT(T, false, size) \
    EVERY_GRADIENT(T, true, size)

#define EVERY_GRADIENT(T, heatmap, size) \
    template __global__ void attention_query_gradient_kernel<T, heatmap, size>( \
        const __grid_constant__ AttentionGradientArguments<T>); \
    template __global__ void attention_key_gradient_kernel<T, heatmap, size>( \
        const __grid_constant__ AttentionGradientArguments<T>);

EVERY_HEAD_SIZE(float, 0)
EVERY_HEAD_SIZE(__half, 0)
EVERY_HEAD_SIZE(__half, 64)
EVERY_HEAD_SIZE(__half, 128)
EVERY_HEAD_SIZE(__nv_bfloat16, 0)
EVERY_HEAD_SIZE(__nv_bfloat16, 64)
EVERY_HEAD_SIZE(__nv_bfloat16, 128)

// Without a body, but for sm_90a.
#define EVERY_WARPGROUP(T, size) \
    template __global__ void attention_warpgroup_kernel<T, size>(const __grid_constant__ AttentionMassArguments<T>);

EVERY_WARPGROUP(__half, 64)
EVERY_WARPGROUP(__half, 128)
EVERY_WARPGROUP(__nv_bfloat16, 64)
EVERY_WARPGROUP(__nv_bfloat16, 128)

#define EVERY_EPILOGUE(T) \
    template __global__ void head_tiles_kernel<T, StatisticsEpilogue>(const __grid_constant__ TileStatisticsArguments); \
    template __global__ void head_tiles_kernel<T, GradientEpilogue<T>>(const __grid_constant__ TileGradientArguments);

EVERY_EPILOGUE(__half)
EVERY_EPILOGUE(__nv_bfloat16)

EVERY_ELEMENT_TYPE(float)
EVERY_ELEMENT_TYPE(__half)
EVERY_ELEMENT_TYPE(__nv_bfloat16)

template __global__ void visual_weights_kernel<kThreads>(const __grid_constant__ VisualWeightsArguments);
template __global__ void group_weights_kernel<kGroupThreads>(const __grid_constant__ GroupWeightsArguments);
template __global__ void token_shaping_kernel<kThreads>(const __grid_constant__ TokenShapingArguments);
template __global__ void response_factors_kernel<kFactorThreads>(const __grid_constant__ ResponseFactorsArguments);
template __global__ void policy_loss_kernel<kThreads>(const __grid_constant__ PolicyLossArguments);
template __global__ void head_mean_kernel<kAttentionThreads>(const __grid_constant__ HeadMeanArguments);
#define STATISTICS_KERNELS(capped, squares)                                \
    template __global__ void head_statistics_kernel<kHeadThreads, capped, squares>( \
        const __grid_constant__ HeadStatisticsArguments);
STATISTICS_KERNELS(false, false)
STATISTICS_KERNELS(false, true)
STATISTICS_KERNELS(true, false)
STATISTICS_KERNELS(true, true)
template __global__ void pair_statistics_kernel<kPairThreads, false>(const __grid_constant__ PairStatisticsArguments);
template __global__ void pair_statistics_kernel<kPairThreads, true>(const __grid_constant__ PairStatisticsArguments);
template __global__ void pair_shares_kernel<kPairThreads, false>(const __grid_constant__ PairSharesArguments);
template __global__ void pair_shares_kernel<kPairThreads, true>(const __grid_constant__ PairSharesArguments);
template __global__ void head_merge_kernel<kMergeWarps>(const __grid_constant__ TileMergeArguments);

}  // namespace cuda
}  // namespace vgpo
