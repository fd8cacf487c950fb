// vgpo_loss on CUDA, everything in one launch: checks, allocation, launch, registration.
#include "vgpo_loss.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

LossTensors vgpo_loss(const at::Tensor& hidden, const at::Tensor& logp, const at::Tensor& old_logp,
                      const at::Tensor& advantages, const OptionalTensor& visual_mask,
                      const at::Tensor& response_mask, const at::Tensor& group_ids, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& prototype, const OptionalTensor& prototype_index,
                      const OptionalTensor& ref_logp, const OptionalTensor& entropy,
                      const OptionalTensor& importance_weights, const OptionalTensor& num_tokens,
                      const OptionalTensor& num_sequences, at::ArrayRef<double> config,
                      at::ArrayRef<double> options) {
    const ArgumentReader reader(hidden.device(), Values::kClamped);
    const Layout layout = reader.layout(response_mask, cu_seqlens);
    const FocusTensors focus = reader.focus(hidden, visual_mask, layout, prototype, prototype_index);
    const LossInput policy = reader.loss(logp, old_logp, advantages, response_mask, focus.layout, ref_logp, entropy,
                                         importance_weights, num_tokens, num_sequences, options);
    const int64_t* groups = reader.tensor<int64_t>("group_ids", group_ids, {layout.batch});
    const WeightsConfig weights_config = reader.config(config);
    LossTensors result = empty_loss(logp, entropy, int64_t{kPolicyMetrics} + kFocusMetrics);
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VgpoLossArguments<T> arguments = {};
        arguments.focus = focus_input<T>(focus);
        arguments.focus.response_mask = policy.response_mask;
        arguments.policy = policy;
        arguments.group_ids = groups;
        arguments.config = weights_config;
        arguments.output = loss_output(result, entropy);
        launch_with_workspace(vgpo_loss_kernel<T>, arguments, reader.device());
    });
    return result;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) { library.impl("vgpo_loss", &vgpo::cuda::vgpo_loss); }
