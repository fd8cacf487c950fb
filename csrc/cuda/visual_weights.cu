// visual_weights and group_weights on CUDA: checks, allocation, launch, registration.
#include "visual_weights.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

Tensors visual_weights(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    check_rows(layout);
    const at::IntArrayRef tokens = reader.shape("response_mask"), each(layout.batch);
    VisualWeightsArguments arguments = {};
    arguments.layout = layout;
    arguments.cos = reader.data<float>("cos", tokens);
    arguments.response_mask = reader.data<bool>("response_mask", tokens);
    arguments.group_ids = reader.data<int64_t>("group_ids", each);
    arguments.has_visual = reader.data<bool>("has_visual", each);
    arguments.config = reader.config();
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, reader.tensor("cos").options()); };
    at::Tensor factors = empty(tokens), psi = empty(tokens), w = empty(tokens);
    at::Tensor phi = empty(each), score = empty(each), metrics = empty({kFocusMetrics});
    arguments.factors = factors.mutable_data_ptr<float>();
    arguments.psi = psi.mutable_data_ptr<float>();
    arguments.w = w.mutable_data_ptr<float>();
    arguments.phi = phi.mutable_data_ptr<float>();
    arguments.metrics = metrics.mutable_data_ptr<float>();
    arguments.workspace.scores = score.mutable_data_ptr<float>();
    launch_with_workspace(visual_weights_kernel<kThreads>, arguments, reader.device());
    return {factors, psi, w, phi, score, metrics};
}

Tensors group_weights(const ArgumentReader& reader) {
    const at::IntArrayRef each = reader.shape("score");
    TORCH_CHECK_VALUE(each.size() == 1, "score must have shape [B], got ", each);
    at::Tensor phi = at::empty(each, reader.tensor("score").options());
    const GroupWeightsArguments arguments{reader.data<float>("score", each),
                                          reader.data<int64_t>("group_ids", each),
                                          reader.data<bool>("has_visual", each),
                                          each[0],
                                          reader.config(),
                                          phi.mutable_data_ptr<float>()};
    launch_blocks(group_weights_kernel<kGroupThreads>, arguments, dim3(grid_blocks(arguments.batch)), kGroupThreads, 0,
                  reader.device());
    return {phi};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("visual_weights", by_name<visual_weights, Values::kClamped>());
    library.impl("group_weights", by_name<group_weights, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
