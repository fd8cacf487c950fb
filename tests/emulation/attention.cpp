// The attention kernels behind C functions that run them on the emulated GPU.
#include <cuda_runtime.h>

#include "../../csrc/cuda/attention_gradients.cuh"
#include "exports.h"
#include "launch.h"

using namespace vgpo;
using namespace vgpo::cuda;

// The arguments of any of these kernels; attention.py mirrors it field by field.
struct Call {
    int64_t order, seed, dtype;
    int64_t batch, queries, keys, heads, key_heads, size, num_segments, window;
    int64_t q_strides[3], k_strides[3], grad_q_strides[3], grad_k_strides[3];
    double scale;
    const int64_t* query_boundaries;
    const int64_t* key_boundaries;
    const void* q;
    const void* k;
    const int32_t* segments;
    const int64_t* positions;
    const float* weights;
    const float* grad;
    const float* mass_in;
    const float* lse_in;
    float* mass;
    float* lse;
    float* heat;
    float* means;
    void* grad_q;
    void* grad_k;
    float* mean;
};

namespace {

template <typename T>
HeadTensor<T> head_tensor(T* data, const int64_t (&strides)[3]) {
    return {data, strides[0], strides[1], strides[2]};
}

template <typename T>
AttentionInput<T> input_of(const Call& call) {
    const auto q = head_tensor(static_cast<const T*>(call.q), call.q_strides);
    const auto k = head_tensor(static_cast<const T*>(call.k), call.k_strides);
    return {q,
            k,
            heads_are_aligned(q, call.size) && heads_are_aligned(k, call.size),
            static_cast<int>(call.size),
            static_cast<int>(call.heads),
            static_cast<int>(call.key_heads),
            call.batch,
            call.queries,
            call.keys,
            call.query_boundaries,
            call.key_boundaries,
            call.segments,
            call.positions,
            static_cast<int>(call.num_segments),
            static_cast<float>(call.scale),
            static_cast<int>(call.window)};
}

template <typename Kernel, typename Arguments>
const char* run(const Call& call, Kernel kernel, const Arguments& arguments, const LaunchShape& shape) {
    emulation::Launch launch;
    launch.grid = {static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.heads),
                   static_cast<unsigned>(shape.parts)};
    launch.block.x = kAttentionThreads;
    launch.dynamic_shared_bytes = static_cast<size_t>(shape.shared_bytes);
    launch.order = static_cast<emulation::Order>(call.order);
    launch.seed = static_cast<uint64_t>(call.seed);
    return run_launch(launch, kernel, arguments);
}

template <typename T>
AttentionGradientArguments<T> gradient_arguments(const Call& call) {
    return {input_of<T>(call), call.grad, call.mass_in, call.weights, call.lse_in, call.means,
            head_tensor(static_cast<T*>(call.grad_q), call.grad_q_strides),
            head_tensor(static_cast<T*>(call.grad_k), call.grad_k_strides)};
}

}  // namespace

extern "C" {

const char* attention_mass(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        const AttentionMassArguments<T> arguments{input_of<T>(*call), call->mass, call->lse};
        return run(*call, attention_mass_kernel<T>, arguments, launch_shape(arguments));
    });
}

const char* attention_heatmap(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        const AttentionHeatmapArguments<T> arguments{input_of<T>(*call), call->weights, call->lse_in, call->heat};
        return run(*call, attention_heatmap_kernel<T>, arguments, launch_shape(arguments));
    });
}

const char* attention_query_gradient(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        const auto arguments = gradient_arguments<T>(*call);
        return run(*call, attention_query_gradient_kernel<T>, arguments, query_gradient_shape(arguments));
    });
}

const char* attention_key_gradient(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        const auto arguments = gradient_arguments<T>(*call);
        return run(*call, attention_key_gradient_kernel<T>, arguments, key_gradient_shape(arguments));
    });
}

// Of [batch, heads, queries] numbers.
const char* head_mean(const Call* call) {
    const HeadMeanArguments arguments{call->mass_in, call->mean, call->batch, static_cast<int>(call->heads),
                                      call->queries};
    return run(*call, head_mean_kernel<kAttentionThreads>, arguments, {2, 1, 1, 0});
}

}  // extern "C"
