// attention_mass, attention_heatmap and their gradients on CUDA: checks, allocation, launch, registration.
#include <torch/library.h>

#include <vector>

#include "attention_gradients.cuh"
#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

// What the operators have in common, of any element type.
struct Attention {
    const at::Tensor &q, &k, &key_segments;
    const OptionalTensor &query_positions, &cu_seqlens_q, &cu_seqlens_k;
    int64_t num_segments;
    double scale;
    int64_t window;

    bool packed() const { return cu_seqlens_q.has_value(); }
    c10::Device device() const { return q.device(); }
    int64_t length(const at::Tensor& tensor) const { return tensor.size(packed() ? 0 : 2); }
    // Shape of one entry a token of q or k.
    std::vector<int64_t> by_token(const at::Tensor& tensor) const {
        return packed() ? std::vector<int64_t>{tensor.size(0)} : std::vector<int64_t>{q.size(0), tensor.size(2)};
    }
    // Shape of one entry a query head and token of q or k.
    std::vector<int64_t> by_head(const at::Tensor& tensor) const {
        return packed() ? std::vector<int64_t>{q.size(1), tensor.size(0)}
                        : std::vector<int64_t>{q.size(0), q.size(1), tensor.size(2)};
    }
    at::Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, q.options().dtype(at::kFloat)); }
};

template <typename T>
HeadTensor<T> head_tensor(T* data, const at::Tensor& tensor) {
    const bool packed = tensor.dim() == 3;
    return {data, packed ? 0 : tensor.stride(0), tensor.stride(1), tensor.stride(packed ? 0 : 2)};
}

const int64_t* checked_boundaries(const char* name, const OptionalTensor& boundaries, int64_t batch,
                                  c10::Device device) {
    return checked<int64_t>(name, boundaries, {batch + 1}, device);
}

template <typename T>
AttentionInput<T> checked_attention(const Attention& given) {
    const auto &q = given.q, &k = given.k;
    const bool packed = given.packed();
    TORCH_CHECK_VALUE(packed == given.cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k belong together");
    const auto check = [&](const char* name, const at::Tensor& tensor) {
        TORCH_CHECK_VALUE(tensor.is_cuda() && tensor.device() == given.device() && tensor.dim() == (packed ? 3 : 4) &&
                              tensor.stride(-1) == 1,
                          name, " must be a CUDA tensor of shape ", packed ? "[N, H, d]" : "[B, H, T, d]",
                          " with a contiguous last dimension, got ", tensor.sizes(), " on ", tensor.device());
    };
    check("q", q);
    check("k", k);
    const int64_t batch = packed ? given.cu_seqlens_q->size(0) - 1 : q.size(0);
    TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && k.size(-1) == q.size(-1) && k.size(1) > 0 &&
                          q.size(1) % k.size(1) == 0 && batch >= 0 && (packed || k.size(0) == batch),
                      "k must have q's dtype, batch and head size and a divisor of its heads, got ", k.scalar_type(),
                      " ", k.sizes(), " and q ", q.scalar_type(), " ", q.sizes());
    const int64_t rows = given.length(q) * (q.size(1) / k.size(1));
    TORCH_CHECK_VALUE(rows <= kMostRows && given.length(k) <= kMostRows, "more than ", kMostRows,
                      " queries times heads of a group, or keys: ", rows, " and ", given.length(k));
    TORCH_CHECK_VALUE(given.num_segments >= 1 && given.num_segments <= kMostRows && given.window >= 0,
                      "num_segments must be positive and window not negative");
    AttentionInput<T> input = {};
    input.q = head_tensor(static_cast<const T*>(q.const_data_ptr()), q);
    input.k = head_tensor(static_cast<const T*>(k.const_data_ptr()), k);
    input.aligned = heads_are_aligned(input.q, q.size(-1)) && heads_are_aligned(input.k, q.size(-1));
    input.size = static_cast<int>(q.size(-1));
    input.heads = static_cast<int>(q.size(1));
    input.key_heads = static_cast<int>(k.size(1));
    input.batch = batch;
    input.queries = given.length(q);
    input.keys = given.length(k);
    input.query_boundaries = checked_boundaries("cu_seqlens_q", given.cu_seqlens_q, batch, given.device());
    input.key_boundaries = checked_boundaries("cu_seqlens_k", given.cu_seqlens_k, batch, given.device());
    input.segments = checked<int32_t>("key_segments", given.key_segments, given.by_token(k), given.device());
    input.positions = checked<int64_t>("query_positions", given.query_positions, given.by_token(q), given.device());
    input.num_segments = static_cast<int>(given.num_segments);
    input.scale = static_cast<float>(given.scale);
    input.window = static_cast<int>(std::min(given.window, kMostRows));
    return input;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape, const Attention& given) {
    int device = 0, most = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    TORCH_CHECK_VALUE(shape.shared_bytes <= most, "heads of ", given.q.size(-1), " components in ",
                      given.q.scalar_type(), " need ", shape.shared_bytes, " bytes of shared memory, and this GPU has ",
                      most, " for a block: vgpo_kernels.backend('triton') serves them");
    const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.heads),
                    static_cast<unsigned>(shape.parts));
    launch_blocks(kernel, arguments, grid, kAttentionThreads, shape.shared_bytes, given.device());
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
    const Attention given{q,            k,            key_segments, query_positions, cu_seqlens_q,
                          cu_seqlens_k, num_segments, scale,        window};
    const c10::cuda::CUDAGuard guard(q.device());
    return by_dtype(
        q,
        [&](auto* type) -> std::tuple<at::Tensor, at::Tensor, at::Tensor> {
            using T = std::remove_pointer_t<decltype(type)>;
            AttentionMassArguments<T> arguments{checked_attention<T>(given), nullptr, nullptr};
            std::vector<int64_t> shape = given.by_head(q);
            at::Tensor lse = given.empty(shape);
            shape.push_back(num_segments);
            at::Tensor mass = given.empty(shape);
            arguments.mass = mass.mutable_data_ptr<float>();
            arguments.lse = lse.mutable_data_ptr<float>();
            launch(attention_mass_kernel<T>, arguments, launch_shape(arguments), given);
            if (per_head) return {mass, given.empty({0}), lse};
            return {mean_of_heads(mass, given.packed()), mass, lse};
        },
        "q");
}

at::Tensor attention_heatmap(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                             const OptionalTensor& query_positions, const at::Tensor& query_weights,
                             const at::Tensor& lse, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, double scale, int64_t window, bool per_head) {
    const Attention given{q,            k,       key_segments, query_positions, cu_seqlens_q,
                          cu_seqlens_k, kLabels, scale,        window};
    const c10::cuda::CUDAGuard guard(q.device());
    return by_dtype(
        q,
        [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            AttentionHeatmapArguments<T> arguments{checked_attention<T>(given), nullptr, nullptr, nullptr};
            arguments.weights = checked<float>("query_weights", query_weights, given.by_token(q), q.device());
            arguments.lse = checked<float>("lse", lse, given.by_head(q), q.device());
            at::Tensor heat = given.empty(given.by_head(k));
            arguments.heat = heat.mutable_data_ptr<float>();
            launch(attention_heatmap_kernel<T>, arguments, launch_shape(arguments), given);
            return per_head ? heat : mean_of_heads(heat, given.packed());
        },
        "q");
}

// Gradients of masses (with `head_mass`) or of a heat map (with `query_weights`), of which `grad` has `grad_shape`.
std::tuple<at::Tensor, at::Tensor> gradients(const Attention& given, const at::Tensor& grad, at::IntArrayRef grad_shape,
                                             const OptionalTensor& head_mass, const OptionalTensor& query_weights,
                                             const at::Tensor& lse) {
    const c10::cuda::CUDAGuard guard(given.device());
    return by_dtype(
        given.q,
        [&](auto* type) -> std::tuple<at::Tensor, at::Tensor> {
            using T = std::remove_pointer_t<decltype(type)>;
            const c10::Device device = given.device();
            AttentionGradientArguments<T> arguments = {};
            arguments.input = checked_attention<T>(given);
            arguments.grad = checked<float>("grad", grad, grad_shape, device);
            arguments.mass = checked<float>("head_mass", head_mass, grad_shape, device);
            arguments.weights = checked<float>("query_weights", query_weights, given.by_token(given.q), device);
            arguments.lse = checked<float>("lse", lse, given.by_head(given.q), device);
            at::Tensor grad_q = at::empty(given.q.sizes(), given.q.options());
            at::Tensor grad_k = at::empty(given.k.sizes(), given.k.options());
            at::Tensor means = given.empty(given.by_head(given.q));
            arguments.grad_q = head_tensor(static_cast<T*>(grad_q.mutable_data_ptr()), grad_q);
            arguments.grad_k = head_tensor(static_cast<T*>(grad_k.mutable_data_ptr()), grad_k);
            arguments.means = means.mutable_data_ptr<float>();
            launch(attention_query_gradient_kernel<T>, arguments, query_gradient_shape(arguments), given);
            launch(attention_key_gradient_kernel<T>, arguments, key_gradient_shape(arguments), given);
            return {grad_q, grad_k};
        },
        "q");
}

std::tuple<at::Tensor, at::Tensor> attention_mass_backward(
    const at::Tensor& grad_mass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const at::Tensor& head_mass, const at::Tensor& lse, double scale, int64_t window) {
    const int64_t num_segments = head_mass.size(-1);
    const Attention given{q,            k,            key_segments, query_positions, cu_seqlens_q,
                          cu_seqlens_k, num_segments, scale,        window};
    std::vector<int64_t> shape = given.by_head(q);
    shape.push_back(num_segments);
    return gradients(given, grad_mass, shape, head_mass, std::nullopt, lse);
}

std::tuple<at::Tensor, at::Tensor> attention_heatmap_backward(
    const at::Tensor& grad_heat, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const at::Tensor& query_weights, const at::Tensor& lse,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double scale, int64_t window) {
    const Attention given{q,            k,       key_segments, query_positions, cu_seqlens_q,
                          cu_seqlens_k, kLabels, scale,        window};
    return gradients(given, grad_heat, given.by_head(k), std::nullopt, query_weights, lse);
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
