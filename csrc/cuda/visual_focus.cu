// visual_prototype and visual_focus on CUDA: checks, allocation, launch, registration.
#include "visual_focus.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

at::Tensor visual_prototype(const at::Tensor& hidden, const at::Tensor& visual_mask, const OptionalTensor& cu_seqlens) {
    check_hidden(hidden, cu_seqlens.has_value());
    const c10::cuda::CUDAGuard guard(hidden.device());
    const Layout layout = checked_layout(visual_mask, cu_seqlens, hidden.size(-2));
    at::Tensor prototypes = at::empty({layout.batch, hidden.size(-1)}, hidden.options().dtype(at::kFloat));
    by_dtype(hidden, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualPrototypeArguments<T> arguments{
            checked_focus<T>(hidden, visual_mask, layout, std::nullopt, std::nullopt), {}};
        arguments.workspace.prototypes = prototypes.mutable_data_ptr<float>();
        launch_with_workspace(visual_prototype_kernel<T>, arguments, hidden.device());
    });
    return prototypes;
}

at::Tensor visual_focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                        const OptionalTensor& prototype_index) {
    check_hidden(hidden, cu_seqlens.has_value());
    const c10::cuda::CUDAGuard guard(hidden.device());
    const Layout layout = checked_layout(response_mask, cu_seqlens, hidden.size(-2));
    at::Tensor cos = at::empty(response_mask.sizes(), hidden.options().dtype(at::kFloat));
    by_dtype(hidden, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualFocusArguments<T> arguments{
            checked_focus<T>(hidden, visual_mask, layout, prototype, prototype_index), {}, cos.mutable_data_ptr<float>()};
        arguments.input.response_mask =
            checked<bool>("response_mask", response_mask, response_mask.sizes(), hidden.device());
        launch_with_workspace(visual_focus_kernel<T>, arguments, hidden.device());
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
