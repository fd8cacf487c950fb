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
    const c10::Device device = response_mask.device();
    const c10::cuda::CUDAGuard guard(device);
    const Layout layout = checked_layout(response_mask, cu_seqlens, response_mask.size(-1));
    const at::IntArrayRef tokens = response_mask.sizes(), each(layout.batch);
    VisualWeightsArguments arguments = {};
    arguments.layout = layout;
    arguments.cos = checked<float>("cos", cos, tokens, device);
    arguments.response_mask = checked<bool>("response_mask", response_mask, tokens, device);
    arguments.group_ids = checked<int64_t>("group_ids", group_ids, each, device);
    arguments.has_visual = checked<bool>("has_visual", has_visual, each, device);
    arguments.config = checked_config(config);
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, cos.options()); };
    at::Tensor factors = empty(tokens), psi = empty(tokens), w = empty(tokens);
    at::Tensor phi = empty(each), score = empty(each), metrics = empty({kFocusMetrics});
    arguments.factors = factors.mutable_data_ptr<float>();
    arguments.psi = psi.mutable_data_ptr<float>();
    arguments.w = w.mutable_data_ptr<float>();
    arguments.phi = phi.mutable_data_ptr<float>();
    arguments.metrics = metrics.mutable_data_ptr<float>();
    arguments.workspace.scores = score.mutable_data_ptr<float>();
    launch_with_workspace(visual_weights_kernel<kThreads>, arguments, device);
    return {factors, psi, w, phi, score, metrics};
}

at::Tensor group_weights(const at::Tensor& score, const at::Tensor& group_ids, const OptionalTensor& has_visual,
                         at::ArrayRef<double> config) {
    TORCH_CHECK_VALUE(score.dim() == 1, "score must have shape [B], got ", score.sizes());
    const c10::Device device = score.device();
    const c10::cuda::CUDAGuard guard(device);
    const at::IntArrayRef each = score.sizes();
    at::Tensor phi = at::empty(each, score.options());
    const GroupWeightsArguments arguments{checked<float>("score", score, each, device),
                                          checked<int64_t>("group_ids", group_ids, each, device),
                                          checked<bool>("has_visual", has_visual, each, device),
                                          score.size(0),
                                          checked_config(config),
                                          phi.mutable_data_ptr<float>()};
    launch(group_weights_kernel<kThreads>, arguments, arguments.batch, device);
    return phi;
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("visual_weights", &vgpo::cuda::visual_weights);
    library.impl("group_weights", &vgpo::cuda::group_weights);
}
