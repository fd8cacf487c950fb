// From hidden states to the loss, its gradient and all metrics in one persistent cooperative kernel.
//
// The phases are those of the separate kernels, the same device functions, divided by grid barriers: list the rows;
// sum runs of visual rows; average them; score the response rows (these three once for each level of images that arrive
// late); weigh each response; weigh the groups and compute the losses; add up. All but the reading of hidden states is
// small: at 8 responses of 1,024 image and 2,048 response tokens and D = 3584 they are 176 MB of 177.
#pragma once

#include "policy_loss.cuh"

namespace vgpo {
namespace cuda {

template <typename T>
struct VgpoLossArguments {
    FocusInput<T> focus;
    LossInput policy;
    const int64_t* group_ids;  // [B]
    WeightsConfig config;
    FocusWorkspace lists;
    WeightsWorkspace weights;
    LossWorkspace loss;
    LossOutput output;  // metrics: [kPolicyMetrics + kFocusMetrics]
};

template <typename T>
void bind(VgpoLossArguments<T>& arguments, Arena& arena) {
    const FocusInput<T>& focus = arguments.focus;
    bind_focus(arguments.lists, arena, focus);
    bind_weights(arguments.weights, arena, focus.layout);
    arguments.weights.scores = arena.take<float>("scores", focus.layout.batch);
    bind_loss(arguments.loss, arena, focus.layout, arguments.policy.options);
}

template <typename T>
int64_t useful_blocks(const VgpoLossArguments<T>& arguments) {
    return useful_blocks(arguments.focus);
}

// Factors from the weighing of a response.
template <typename T>
struct FocusFactor {
    const VgpoLossArguments<T>& arguments;
    int index;  // of the response
    ResponseFocus response;
    float phi;

    __device__ FocusFactor(const VgpoLossArguments<T>& arguments_, int index_) : arguments(arguments_), index(index_) {}
    // Whole warps call this.
    __device__ void prepare() {
        const WeightsWorkspace& weights = arguments.weights;
        response = weights.responses[index];
        phi = group_weight(weights, arguments.group_ids, arguments.focus.layout.batch, index, arguments.config);
    }
    __device__ float load(int ordinal, int64_t) const {
        return arguments.weights.weights[arguments.focus.layout.token_begin(index) + ordinal];
    }
    __device__ float of(float weight, int ordinal) const {
        if (response.standing != Standing::kWeighted) return 1.0f;
        return advantage_factor(intra_weight(weight, ordinal, response, arguments.config), phi, arguments.config);
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    vgpo_loss_kernel(const __grid_constant__ VgpoLossArguments<T> arguments) {
    const FocusWorkspace& lists = arguments.lists;
    const WeightsWorkspace& weights = arguments.weights;
    const WeightsConfig& config = arguments.config;
    const LossOutput& output = arguments.output;
    const Layout& layout = arguments.focus.layout;

    begin_loss(arguments.loss);
    focus_cosines<true>(arguments.focus, lists, weights.weights, [&](int64_t token) { output.clear(token); });
    prefetch_loss(arguments.policy);
    grid_sync();
    // Cosines say by themselves which tokens see an image.
    weigh_responses<true>(layout, lists, weights, weights.weights, config, [](int64_t) { return true; });
    grid_sync();
    const bool is_last = batch_loss(arguments.policy, output, lists, arguments.loss,
                                    [&](int response) { return FocusFactor<T>(arguments, response); });
    if (!is_last) return;
    write_policy_metrics(arguments.loss.sums, lists.token_count, layout.batch, output);
    // The first warp is busy with the policy's.
    if (warp_index() != warps_per_block() - 1) return;
    write_focus_metrics(weights.responses, layout.batch, output.metrics + kPolicyMetrics);
}

}  // namespace cuda
}  // namespace vgpo
