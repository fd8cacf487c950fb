// attention_mass, attention_heatmap and their gradients on CUDA: checks, allocation, launch, registration.
#include <torch/library.h>

#include <vector>

#include "attention_gradients.cuh"
#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

template <typename T>
HeadTensor<const T> head_tensor(const Heads& given) {
    return {static_cast<const T*>(given.data), given.batch_stride, given.head_stride, given.token_stride};
}

template <typename T>
HeadTensor<T> gradient_of(at::Tensor& gradient) {
    const bool packed = gradient.dim() == 3;
    return {static_cast<T*>(gradient.mutable_data_ptr()), packed ? 0 : gradient.stride(0), gradient.stride(1),
            gradient.stride(packed ? 0 : 2)};
}

// Queries and keys for kernels of element type T, which count in 32 bits.
template <typename T>
AttentionInput<T> attention_input(const AttentionTensors& given) {
    const int64_t rows = given.q.length * given.group();
    TORCH_CHECK_VALUE(rows <= kMostRows && given.k.length <= kMostRows && given.num_segments <= kMostRows, "more than ",
                      kMostRows, " queries times heads of a group, keys or segments: ", rows, ", ", given.k.length,
                      " and ", given.num_segments);
    AttentionInput<T> input = {};
    input.q = head_tensor<T>(given.q);
    input.k = head_tensor<T>(given.k);
    input.aligned = heads_are_aligned(input.q, given.size) && heads_are_aligned(input.k, given.size);
    input.size = static_cast<int>(given.size);
    input.heads = static_cast<int>(given.q.heads);
    input.key_heads = static_cast<int>(given.k.heads);
    input.batch = given.batch;
    input.queries = given.q.length;
    input.keys = given.k.length;
    input.query_boundaries = given.q.boundaries;
    input.key_boundaries = given.k.boundaries;
    input.segments = given.segments;
    input.positions = given.positions;
    input.num_segments = static_cast<int>(given.num_segments);
    input.scale = given.scale;
    input.window = static_cast<int>(std::min(given.window, kMostRows));
    return input;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape, const at::Tensor& q) {
    const c10::Device device = q.device();
    int most = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()));
    TORCH_CHECK_VALUE(shape.shared_bytes <= most, "heads of ", q.size(-1), " components in ", q.scalar_type(),
                      " need ", shape.shared_bytes, " bytes of shared memory, and this GPU has ", most,
                      " for a block: vgpo_kernels.backend('triton') serves them");
    const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.heads),
                    static_cast<unsigned>(shape.parts));
    launch_blocks(kernel, arguments, grid, kAttentionThreads, shape.shared_bytes, device);
}

// The mean over the dimension of heads.
at::Tensor mean_of_heads(const at::Tensor& by_head, bool packed) {
    constexpr int64_t kMostBlocks = 4096;
    const int64_t head_dim = packed ? 0 : 1;
    std::vector<int64_t> shape = by_head.sizes().vec();
    shape.erase(shape.begin() + head_dim);
    at::Tensor mean = at::empty(shape, by_head.options());
    const int64_t batch = packed ? 1 : by_head.size(0), results = mean.numel();
    const HeadMeanArguments arguments{by_head.const_data_ptr<float>(), mean.mutable_data_ptr<float>(), batch,
                                      static_cast<int>(by_head.size(head_dim)), results / std::max<int64_t>(batch, 1)};
    const int64_t blocks = std::min(ceil_div<int64_t>(results, kAttentionThreads), kMostBlocks);
    launch_blocks(head_mean_kernel<kAttentionThreads>, arguments, dim3(static_cast<unsigned>(blocks)),
                  kAttentionThreads, 0, by_head.device());
    return mean;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_mass(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments, const OptionalTensor& query_positions,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t num_segments, double scale,
    int64_t window, bool per_head) {
    const ArgumentReader reader(q.device(), Values::kClamped);
    const AttentionTensors given = reader.attention(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k,
                                                    num_segments, scale, window);
    std::vector<int64_t> shape = given.head_shape(given.q);
    at::Tensor lse = at::empty(shape, q.options().dtype(at::kFloat));
    shape.push_back(num_segments);
    at::Tensor mass = at::empty(shape, lse.options());
    by_type(given.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AttentionMassArguments<T> arguments{attention_input<T>(given), mass.mutable_data_ptr<float>(),
                                                  lse.mutable_data_ptr<float>()};
        launch(attention_mass_kernel<T>, arguments, launch_shape(arguments), q);
    });
    if (per_head) return {mass, at::empty({0}, lse.options()), lse};
    return {mean_of_heads(mass, given.packed()), mass, lse};
}

at::Tensor attention_heatmap(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                             const OptionalTensor& query_positions, const at::Tensor& query_weights,
                             const at::Tensor& lse, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, double scale, int64_t window, bool per_head) {
    const ArgumentReader reader(q.device(), Values::kClamped);
    const AttentionTensors given = reader.attention(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k,
                                                    kLabels, scale, window);
    const float* weights = reader.tensor<float>("query_weights", query_weights, given.token_shape(given.q));
    const float* lse_data = reader.tensor<float>("lse", lse, given.head_shape(given.q));
    at::Tensor heat = at::empty(given.head_shape(given.k), lse.options());
    by_type(given.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AttentionHeatmapArguments<T> arguments{attention_input<T>(given), weights, lse_data,
                                                     heat.mutable_data_ptr<float>()};
        launch(attention_heatmap_kernel<T>, arguments, launch_shape(arguments), q);
    });
    return per_head ? heat : mean_of_heads(heat, given.packed());
}

// Gradients w.r.t. q and k of masses (given `mass`) or of a heat map (given `weights`).
std::tuple<at::Tensor, at::Tensor> gradients(const AttentionTensors& given, const at::Tensor& q, const at::Tensor& k,
                                             const float* grad, const float* mass, const float* weights,
                                             const float* lse) {
    at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
    at::Tensor means = at::empty(given.head_shape(given.q), q.options().dtype(at::kFloat));
    by_type(given.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AttentionGradientArguments<T> arguments{attention_input<T>(given), grad, mass, weights, lse,
                                                      means.mutable_data_ptr<float>(), gradient_of<T>(grad_q),
                                                      gradient_of<T>(grad_k)};
        launch(attention_query_gradient_kernel<T>, arguments, query_gradient_shape(arguments), q);
        launch(attention_key_gradient_kernel<T>, arguments, key_gradient_shape(arguments), q);
    });
    return {grad_q, grad_k};
}

std::tuple<at::Tensor, at::Tensor> attention_mass_backward(
    const at::Tensor& grad_mass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const at::Tensor& head_mass, const at::Tensor& lse, double scale, int64_t window) {
    TORCH_CHECK_VALUE(head_mass.dim() > 0, "head_mass must have shape [..., segments], got ", head_mass.sizes());
    const ArgumentReader reader(q.device(), Values::kClamped);
    const AttentionTensors given = reader.attention(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k,
                                                    head_mass.size(-1), scale, window);
    std::vector<int64_t> shape = given.head_shape(given.q);
    const float* lse_data = reader.tensor<float>("lse", lse, shape);
    shape.push_back(given.num_segments);
    return gradients(given, q, k, reader.tensor<float>("grad_mass", grad_mass, shape),
                     reader.tensor<float>("head_mass", head_mass, shape), nullptr, lse_data);
}

std::tuple<at::Tensor, at::Tensor> attention_heatmap_backward(
    const at::Tensor& grad_heat, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const at::Tensor& query_weights, const at::Tensor& lse,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double scale, int64_t window) {
    const ArgumentReader reader(q.device(), Values::kClamped);
    const AttentionTensors given = reader.attention(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k,
                                                    kLabels, scale, window);
    return gradients(given, q, k, reader.tensor<float>("grad_heat", grad_heat, given.head_shape(given.k)), nullptr,
                     reader.tensor<float>("query_weights", query_weights, given.token_shape(given.q)),
                     reader.tensor<float>("lse", lse, given.head_shape(given.q)));
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("attention_mass", &vgpo::cuda::attention_mass);
    library.impl("attention_mass_backward", &vgpo::cuda::attention_mass_backward);
    library.impl("attention_heatmap", &vgpo::cuda::attention_heatmap);
    library.impl("attention_heatmap_backward", &vgpo::cuda::attention_heatmap_backward);
}
