// visual_prototype and visual_focus on CUDA: checks, allocation, launch, registration.
#include "visual_focus.cuh"

#include <torch/library.h>

#include "binding.cuh"
#include "causal_prototype.cuh"

namespace vgpo {
namespace cuda {
namespace {

// Leaves in `input` what makes unit vectors of the visual rows. The memory that it returns has to outlive the kernel.
template <typename T>
at::Tensor take_norms(FocusInput<T>& input, const ArgumentReader& reader) {
    at::Tensor norms =
        at::empty({input.layout.num_rows()}, reader.tensor("hidden").options().dtype(at::kFloat));
    const InverseNormArguments<T> arguments{input, norms.mutable_data_ptr<float>()};
    input.inverse_norms = arguments.inverse_norms;
    launch_blocks(inverse_norm_kernel<T>, arguments, dim3(grid_blocks(useful_blocks(arguments))), kThreads, 0,
                  reader.device());
    return norms;
}

Tensors visual_prototype(const ArgumentReader& reader) {
    const Layout layout = reader.layout("visual_mask");
    const FocusTensors input = reader.hidden(layout);
    const bool causal = reader.value<bool>("causal"), unit = reader.value<bool>("unit");
    const auto options = reader.tensor("hidden").options().dtype(at::kFloat);
    at::Tensor prototypes = causal ? at::empty(reader.shape("hidden"), options)
                                   : at::empty({layout.batch, input.columns}, options);
    by_type(input.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        float* results = prototypes.mutable_data_ptr<float>();
        FocusInput<T> rows = focus_input<T>(input);
        at::Tensor norms;
        if (unit) norms = take_norms(rows, reader);
        if (causal) {
            const CausalPrototypeArguments<T> arguments{rows, results};
            launch_blocks(unit ? causal_unit_prototype_kernel<T> : causal_prototype_kernel<T>, arguments,
                          dim3(grid_blocks(useful_blocks(arguments))), kThreads, 0, reader.device());
            return;
        }
        VisualPrototypeArguments<T> arguments{rows, {}};
        arguments.workspace.prototypes = results;
        launch_with_workspace(unit ? unit_prototype_kernel<T> : visual_prototype_kernel<T>, arguments,
                              reader.device());
    });
    return {prototypes};
}

Tensors visual_focus(const ArgumentReader& reader) {
    const at::IntArrayRef tokens = reader.shape("response_mask");
    const FocusTensors focus = reader.focus(reader.layout("response_mask"));
    const bool* mask = reader.data<bool>("response_mask", tokens);
    const bool unit = reader.value<bool>("unit");
    at::Tensor cos = at::empty(tokens, reader.tensor("hidden").options().dtype(at::kFloat));
    by_type(focus.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        VisualFocusArguments<T> arguments{focus_input<T>(focus), {}, cos.mutable_data_ptr<float>()};
        arguments.input.response_mask = mask;
        at::Tensor norms;
        if (unit && focus.prototype == nullptr) norms = take_norms(arguments.input, reader);
        launch_with_workspace(unit ? unit_focus_kernel<T> : visual_focus_kernel<T>, arguments, reader.device());
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
