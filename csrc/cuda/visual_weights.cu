// visual_weights and group_weights on CUDA: checks, allocation, launch, registration.
#include "visual_weights.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> visual_weights(
    const at::Tensor& cos, const at::Tensor& response_mask, const at::Tensor& group_ids,
    const OptionalTensor& has_visual, const OptionalTensor& cu_seqlens, at::ArrayRef<double> config) {
    const ArgumentReader reader(response_mask.device(), Values::kClamped);
    const Layout layout = reader.layout(response_mask, cu_seqlens);
    check_rows(layout);
    const at::IntArrayRef tokens = response_mask.sizes(), each(layout.batch);
    VisualWeightsArguments arguments = {};
    arguments.layout = layout;
    arguments.cos = reader.tensor<float>("cos", cos, tokens);
    arguments.response_mask = reader.tensor<bool>("response_mask", response_mask, tokens);
    arguments.group_ids = reader.tensor<int64_t>("group_ids", group_ids, each);
    arguments.has_visual = reader.tensor<bool>("has_visual", has_visual, each);
    arguments.config = reader.config(config);
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, cos.options()); };
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

at::Tensor group_weights(const at::Tensor& score, const at::Tensor& group_ids, const OptionalTensor& has_visual,
                         at::ArrayRef<double> config) {
    TORCH_CHECK_VALUE(score.dim() == 1, "score must have shape [B], got ", score.sizes());
    const ArgumentReader reader(score.device(), Values::kClamped);
    const at::IntArrayRef each = score.sizes();
    at::Tensor phi = at::empty(each, score.options());
    const GroupWeightsArguments arguments{reader.tensor<float>("score", score, each),
                                          reader.tensor<int64_t>("group_ids", group_ids, each),
                                          reader.tensor<bool>("has_visual", has_visual, each),
                                          score.size(0),
                                          reader.config(config),
                                          phi.mutable_data_ptr<float>()};
    launch(group_weights_kernel<kThreads>, arguments, arguments.batch, reader.device());
    return phi;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("visual_weights", &vgpo::cuda::visual_weights);
    library.impl("group_weights", &vgpo::cuda::group_weights);
}
