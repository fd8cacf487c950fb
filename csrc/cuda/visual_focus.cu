// visual_prototype and visual_focus on CUDA: checks, allocation, launch, registration.
#include "visual_focus.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

at::Tensor visual_prototype(const at::Tensor& hidden, const at::Tensor& visual_mask, const OptionalTensor& cu_seqlens) {
    const ArgumentReader reader(hidden.device(), Values::kClamped);
    const Layout layout = reader.layout(visual_mask, cu_seqlens);
    const FocusTensors focus = reader.focus(hidden, visual_mask, layout, std::nullopt, std::nullopt);
    at::Tensor prototypes = at::empty({layout.batch, focus.columns}, hidden.options().dtype(at::kFloat));
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualPrototypeArguments<T> arguments{focus_input<T>(focus), {}};
        arguments.workspace.prototypes = prototypes.mutable_data_ptr<float>();
        launch_with_workspace(visual_prototype_kernel<T>, arguments, reader.device());
    });
    return prototypes;
}

at::Tensor visual_focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                        const OptionalTensor& prototype_index) {
    const ArgumentReader reader(hidden.device(), Values::kClamped);
    const Layout layout = reader.layout(response_mask, cu_seqlens);
    const FocusTensors focus = reader.focus(hidden, visual_mask, layout, prototype, prototype_index);
    const bool* mask = reader.tensor<bool>("response_mask", response_mask, response_mask.sizes());
    at::Tensor cos = at::empty(response_mask.sizes(), hidden.options().dtype(at::kFloat));
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualFocusArguments<T> arguments{focus_input<T>(focus), {}, cos.mutable_data_ptr<float>()};
        arguments.input.response_mask = mask;
        launch_with_workspace(visual_focus_kernel<T>, arguments, reader.device());
    });
    return cos;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("visual_prototype", &vgpo::cuda::visual_prototype);
    library.impl("visual_focus", &vgpo::cuda::visual_focus);
}
