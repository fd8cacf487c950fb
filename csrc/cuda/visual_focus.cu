// visual_prototype and visual_focus on CUDA: checks, allocation, launch, registration.
#include "visual_focus.cuh"

#include <torch/library.h>

#include "binding.cuh"
#include "causal_prototype.cuh"

namespace vgpo {
namespace cuda {
namespace {

Tensors visual_prototype(const ArgumentReader& reader) {
    const Layout layout = reader.layout("visual_mask");
    const FocusTensors input = reader.hidden(layout);
    const bool causal = reader.value<bool>("causal");
    const auto options = reader.tensor("hidden").options().dtype(at::kFloat);
    at::Tensor prototypes = causal ? at::empty(reader.shape("hidden"), options)
                                   : at::empty({layout.batch, input.columns}, options);
    by_type(input.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        float* results = prototypes.mutable_data_ptr<float>();
        if (causal) {
            const CausalPrototypeArguments<T> arguments{focus_input<T>(input), results};
            launch_blocks(causal_prototype_kernel<T>, arguments, dim3(grid_blocks(useful_blocks(arguments))), kThreads,
                          0, reader.device());
            return;
        }
        VisualPrototypeArguments<T> arguments{focus_input<T>(input), {}};
        arguments.workspace.prototypes = results;
        launch_with_workspace(visual_prototype_kernel<T>, arguments, reader.device());
    });
    return {prototypes};
}

Tensors visual_focus(const ArgumentReader& reader) {
    const at::IntArrayRef tokens = reader.shape("response_mask");
    const FocusTensors focus = reader.focus(reader.layout("response_mask"));
    const bool* mask = reader.data<bool>("response_mask", tokens);
    at::Tensor cos = at::empty(tokens, reader.tensor("hidden").options().dtype(at::kFloat));
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualFocusArguments<T> arguments{focus_input<T>(focus), {}, cos.mutable_data_ptr<float>()};
        arguments.input.response_mask = mask;
        launch_with_workspace(visual_focus_kernel<T>, arguments, reader.device());
    });
    return {cos};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("visual_prototype", by_name<visual_prototype, Values::kClamped>());
    library.impl("visual_focus", by_name<visual_focus, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
