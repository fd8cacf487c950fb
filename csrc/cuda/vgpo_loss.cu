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
    check_hidden(hidden, cu_seqlens.has_value());
    const c10::Device device = hidden.device();
    const c10::cuda::CUDAGuard guard(device);
    TORCH_CHECK_VALUE(response_mask.device() == device, "response_mask must be on ", device, ", got ",
                      response_mask.device());
    const Layout layout = checked_layout(response_mask, cu_seqlens, hidden.size(-2));
    const PolicyInput policy = checked_policy(logp, old_logp, advantages, response_mask, layout, ref_logp, entropy,
                                              importance_weights, num_tokens, num_sequences, options);
    LossTensors result = empty_loss(logp, entropy, int64_t{kPolicyMetrics} + kFocusMetrics);
    by_dtype(hidden, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VgpoLossArguments<T> arguments = {};
        arguments.focus = checked_focus<T>(hidden, visual_mask, layout, prototype, prototype_index);
        arguments.focus.response_mask = policy.response_mask;
        arguments.policy = policy;
        arguments.group_ids = checked<int64_t>("group_ids", group_ids, {layout.batch}, device);
        arguments.config = checked_config(config);
        arguments.output = loss_output(result, entropy);
        launch_with_workspace(vgpo_loss_kernel<T>, arguments, device);
    });
    return result;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) { library.impl("vgpo_loss", &vgpo::cuda::vgpo_loss); }
