// attention_mass, attention_heatmap and their gradients on CUDA: checks, allocation, launch, registration.
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "attention_gradients.cuh"
#include "binding.cuh"

#ifdef VGPO_HOPPER
#include "attention_warpgroup.cuh"
#endif

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

static_assert(kMostSegments == int64_t{65535} * kBlockSegments, "as many blocks as a grid's third dimension has");

// Queries and keys for kernels of element type T, which count in 32 bits.
template <typename T>
AttentionInput<T> attention_input(const AttentionTensors& given) {
    const int64_t rows = given.q.length * given.group();
    // Of so many keys twice as many positions differ in what they see.
    constexpr int64_t kMostKeys = int64_t{1} << 30;
    TORCH_CHECK_VALUE(rows <= kMostRows && given.k.length <= kMostKeys, "more than ", kMostRows,
                      " queries times heads of a group or ", kMostKeys, " keys: ", rows, " and ", given.k.length);
    AttentionInput<T> input = {};
    input.q = head_tensor<T>(given.q);
    input.k = head_tensor<T>(given.k);
    input.aligned = heads_are_aligned(input.q, given.size, given.batch, given.q.heads, given.q.length) &&
                    heads_are_aligned(input.k, given.size, given.batch, given.k.heads, given.k.length);
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
    input.window = static_cast<int>(std::min(given.window, std::max<int64_t>(given.k.length, 1)));
    input.longer = given.window - input.window;
    return input;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape, const at::Tensor& q) {
    const c10::Device device = q.device();
    int most = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()));
    // What a kernel declares itself comes on top of the tiles: block_reduce's partial results.
    const int bytes = shape.shared_bytes + static_cast<int>(kMaxWarps * sizeof(Positions));
    TORCH_CHECK_VALUE(bytes <= most, "heads of ", q.size(-1), " components in ", q.scalar_type(), " need ", bytes,
                      " bytes of shared memory, and this GPU has ", most,
                      " for a block: vgpo_kernels.backend('triton') serves them");
    const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.heads),
                    static_cast<unsigned>(shape.parts));
    launch_blocks(kernel, arguments, grid, kAttentionThreads, shape.shared_bytes, device);
}

// Calls `body` with an input of an element type and with the size of its heads: 64 or 128, for which 16-bit types have
// kernels of their own, else 0, for those of any size.
template <typename Body>
void by_heads(const AttentionTensors& given, Body body) {
    by_type(given.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AttentionInput<T> input = attention_input<T>(given);
        if constexpr (sizeof(T) == 2) {
            if (input.aligned && input.size == 64) return body(input, std::integral_constant<int, 64>());
            if (input.aligned && input.size == 128) return body(input, std::integral_constant<int, 128>());
        }
        body(input, std::integral_constant<int, 0>());
    });
}

// Computes masses with the products of warpgroups, if the device has these and VGPO_WARPGROUP_ATTENTION is 1 in the
// environment; says whether it has.
template <typename T, int kSize>
bool launch_warpgroups([[maybe_unused]] const AttentionMassArguments<T>& arguments,
                       [[maybe_unused]] const at::Tensor& q) {
#ifdef VGPO_HOPPER
    if constexpr (kSize != 0) {
        const char* given = std::getenv("VGPO_WARPGROUP_ATTENTION");
        if (given == nullptr || std::strcmp(given, "1") != 0 || !is_hopper(q.device())) return false;
        LaunchShape shape = launch_shape(arguments);
        shape.shared_bytes = BoxTiles<T, kSize>::bytes();
        launch(attention_warpgroup_kernel<T, kSize>, arguments, shape, q);
        return true;
    }
#endif
    return false;
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

Tensors attention_mass(const ArgumentReader& reader) {
    const auto num_segments = reader.value<int64_t>("num_segments");
    const bool per_head = reader.value<bool>("per_head");
    const AttentionTensors given = reader.attention(num_segments);
    std::vector<int64_t> shape = given.head_shape(given.q);
    at::Tensor lse = at::empty(shape, reader.tensor("q").options().dtype(at::kFloat));
    shape.push_back(num_segments);
    at::Tensor mass = at::empty(shape, lse.options());
    by_heads(given, [&](const auto& input, auto size) {
        using T = typename std::decay_t<decltype(input)>::Element;
        const AttentionMassArguments<T> arguments{input, mass.mutable_data_ptr<float>(),
                                                  lse.mutable_data_ptr<float>()};
        if (launch_warpgroups<T, size()>(arguments, reader.tensor("q"))) return;
        launch(attention_mass_kernel<T, size()>, arguments, launch_shape(arguments), reader.tensor("q"));
    });
    if (per_head) return {mass, at::empty({0}, lse.options()), lse};
    return {mean_of_heads(mass, given.packed()), mass, lse};
}

Tensors attention_heatmap(const ArgumentReader& reader) {
    const bool per_head = reader.value<bool>("per_head");
    const AttentionTensors given = reader.attention(kLabels);
    const float* weights = reader.data<float>("query_weights", given.token_shape(given.q));
    const float* lse = reader.data<float>("lse", given.head_shape(given.q));
    at::Tensor heat = at::empty(given.head_shape(given.k), reader.tensor("lse").options());
    by_heads(given, [&](const auto& input, auto size) {
        using T = typename std::decay_t<decltype(input)>::Element;
        const AttentionHeatmapArguments<T> arguments{input, weights, lse, heat.mutable_data_ptr<float>()};
        launch(attention_heatmap_kernel<T, size()>, arguments, launch_shape(arguments), reader.tensor("q"));
    });
    return {per_head ? heat : mean_of_heads(heat, given.packed())};
}

// Gradients w.r.t. q and k of masses (given `mass`) or of a heat map (given `weights`).
template <bool kHeatmap>
Tensors gradients(const ArgumentReader& reader, const AttentionTensors& given, const float* grad, const float* mass,
                  const float* weights, const float* lse) {
    const at::Tensor &q = reader.tensor("q"), &k = reader.tensor("k");
    at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
    at::Tensor means = at::empty(given.head_shape(given.q), q.options().dtype(at::kFloat));
    by_heads(given, [&](const auto& input, auto size) {
        using T = typename std::decay_t<decltype(input)>::Element;
        const AttentionGradientArguments<T> arguments{input, grad, mass, weights, lse, means.mutable_data_ptr<float>(),
                                                      gradient_of<T>(grad_q), gradient_of<T>(grad_k)};
        launch(attention_query_gradient_kernel<T, kHeatmap, size()>, arguments, query_gradient_shape(arguments), q);
        launch(attention_key_gradient_kernel<T, kHeatmap, size()>, arguments, key_gradient_shape(arguments), q);
    });
    return {grad_q, grad_k};
}

Tensors attention_mass_backward(const ArgumentReader& reader) {
    const at::IntArrayRef masses = reader.shape("head_mass");
    TORCH_CHECK_VALUE(!masses.empty(), "head_mass must have shape [..., segments], got ", masses);
    const AttentionTensors given = reader.attention(masses.back());
    std::vector<int64_t> shape = given.head_shape(given.q);
    const float* lse = reader.data<float>("lse", shape);
    shape.push_back(given.num_segments);
    return gradients<false>(reader, given, reader.data<float>("grad_mass", shape),
                            reader.data<float>("head_mass", shape), nullptr, lse);
}

Tensors attention_heatmap_backward(const ArgumentReader& reader) {
    const AttentionTensors given = reader.attention(kLabels);
    return gradients<true>(reader, given, reader.data<float>("grad_heat", given.head_shape(given.k)), nullptr,
                           reader.data<float>("query_weights", given.token_shape(given.q)),
                           reader.data<float>("lse", given.head_shape(given.q)));
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("attention_mass", by_name<attention_mass, Values::kClamped>());
    library.impl("attention_mass_backward", by_name<attention_mass_backward, Values::kClamped>());
    library.impl("attention_heatmap", by_name<attention_heatmap, Values::kClamped>());
    library.impl("attention_heatmap_backward", by_name<attention_heatmap_backward, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
