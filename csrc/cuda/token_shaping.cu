// token_shaping and response_factors on CUDA: checks, allocation, launch, registration.
#include "token_shaping.cuh"

#include <torch/library.h>

#include "binding.cuh"

namespace vgpo {
namespace cuda {
namespace {

Tensors token_shaping(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    check_rows(layout);
    const at::IntArrayRef tokens = reader.shape("response_mask"), each(layout.batch);
    TokenShapingArguments arguments = {};
    arguments.layout = layout;
    arguments.visual = reader.data<float>("visual", tokens);
    arguments.entropy = reader.data<float>("entropy", tokens);
    arguments.gap = reader.data<float>("gap", tokens);
    arguments.response_mask = reader.data<bool>("response_mask", tokens);
    arguments.group_ids = reader.data<int64_t>("group_ids", each);
    arguments.progress = static_cast<float>(reader.value<double>("progress"));
    arguments.config = reader.shaping();
    const ShapingConfig& config = arguments.config;
    TORCH_CHECK_VALUE(reader.has("entropy") || !config.reads_entropy(), "entropy is None, which this config reads");
    TORCH_CHECK_VALUE(reader.has("gap") || !config.fuses(), "gap is None, which this config reads");
    TORCH_CHECK_VALUE(!arguments.pools() || layout.num_tokens() <= kMostRows, "a selection among more than ",
                      kMostRows, " tokens: ", layout.num_tokens());
    const auto options = reader.tensor("visual").options();
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, options); };
    at::Tensor factors = empty(tokens), weights = empty(tokens), selected = at::empty(tokens, options.dtype(at::kBool));
    at::Tensor response_factor = empty(each), score = empty(each), metrics = empty({kShapingMetrics});
    arguments.factors = factors.mutable_data_ptr<float>();
    arguments.weights = weights.mutable_data_ptr<float>();
    arguments.selected = selected.mutable_data_ptr<bool>();
    arguments.response_factor = response_factor.mutable_data_ptr<float>();
    arguments.score = score.mutable_data_ptr<float>();
    arguments.metrics = metrics.mutable_data_ptr<float>();
    launch_with_workspace(token_shaping_kernel<kThreads>, arguments, reader.device());
    return {factors, weights, selected, response_factor, score, metrics};
}

Tensors response_factors(const ArgumentReader& reader) {
    const at::IntArrayRef each = reader.shape("score");
    TORCH_CHECK_VALUE(each.size() == 1, "score must have shape [B], got ", each);
    at::Tensor factors = at::empty(each, reader.tensor("score").options());
    const ResponseFactorsArguments arguments{reader.data<float>("score", each),
                                             reader.data<int64_t>("group_ids", each),
                                             each[0],
                                             static_cast<float>(reader.value<double>("progress")),
                                             reader.shaping(),
                                             factors.mutable_data_ptr<float>()};
    launch_blocks(response_factors_kernel<kFactorThreads>, arguments, dim3(grid_blocks(arguments.batch)),
                  kFactorThreads, 0, reader.device());
    return {factors};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CUDA, library) {
    library.impl("token_shaping", by_name<token_shaping, Values::kClamped>());
    library.impl("response_factors", by_name<response_factors, Values::kClamped>());
}

}  // namespace
}  // namespace cuda
}  // namespace vgpo
