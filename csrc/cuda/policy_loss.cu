// policy_loss on CUDA: checks, allocation, launch, registration.
#include "policy_loss.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

LossTensors policy_loss(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                        const at::Tensor& response_mask, const OptionalTensor& factors,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& ref_logp,
                        const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                        const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                        at::ArrayRef<double> options) {
    const ArgumentReader reader(response_mask.device(), Values::kClamped);
    const Layout layout = reader.layout(response_mask, cu_seqlens);
    check_rows(layout);
    PolicyLossArguments arguments = {};
    arguments.input = reader.loss(logp, old_logp, advantages, response_mask, layout, ref_logp, entropy,
                                  importance_weights, num_tokens, num_sequences, options);
    arguments.factors = reader.tensor<float>("factors", factors, response_mask.sizes());
    LossTensors result = empty_loss(logp, entropy, kPolicyMetrics);
    arguments.output = loss_output(result, entropy);
    launch_with_workspace(policy_loss_kernel<kThreads>, arguments, reader.device());
    return result;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) { library.impl("policy_loss", &vgpo::cuda::policy_loss); }
