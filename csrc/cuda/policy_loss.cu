// policy_loss on CUDA: checks, allocation, launch, registration.
#include "policy_loss.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

Tensors policy_loss(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    check_rows(layout);
    PolicyLossArguments arguments = {};
    arguments.input = reader.loss(layout);
    arguments.factors = reader.data<float>("factors", reader.shape("response_mask"));
    const LossResult result = reader.empty_loss(kPolicyMetrics);
    arguments.output = result.output;
    launch_with_workspace(policy_loss_kernel<kThreads>, arguments, reader.device());
    return result.tensors;
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("policy_loss", by_name<policy_loss, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
