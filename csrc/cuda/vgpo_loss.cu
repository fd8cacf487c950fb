// vgpo_loss on CUDA, everything in one launch: checks, allocation, launch, registration.
#include "vgpo_loss.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

Tensors vgpo_loss(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    const FocusTensors focus = reader.focus(layout);
    const LossInput policy = reader.loss(focus.layout);
    const int64_t* groups = reader.data<int64_t>("group_ids", {layout.batch});
    const WeightsConfig config = reader.config();
    const LossResult result = reader.empty_loss(int64_t{kPolicyMetrics} + int64_t{kFocusMetrics});
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VgpoLossArguments<T> arguments = {};
        arguments.focus = focus_input<T>(focus);
        arguments.focus.response_mask = policy.response_mask;
        arguments.policy = policy;
        arguments.group_ids = groups;
        arguments.config = config;
        arguments.output = result.output;
        launch_with_workspace(vgpo_loss_kernel<T>, arguments, reader.device());
    });
    return result.tensors;
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) { library.impl("vgpo_loss", by_name<vgpo_loss, Values::kClamped>()); }

}  // namespace
}  // namespace cuda
}  // namespace vgpo
