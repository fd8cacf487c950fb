#include <torch/library.h>

#include <memory>

#include "../arguments.h"
#include "stages.h"

namespace vgpo::ops {
namespace {

// The three stages one after the other. Between them stand four arrays of N floats and the prototypes, nothing of
// the size of the hidden states.
LossTensors vgpo_loss(const at::Tensor& hidden, const at::Tensor& logp, const at::Tensor& old_logp,
                      const at::Tensor& advantages, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                      const at::Tensor& group_ids, const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                      const OptionalTensor& prototype_index, const OptionalTensor& ref_logp,
                      const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                      const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                      at::ArrayRef<double> config, at::ArrayRef<double> options) {
    const ArgumentReader reader(at::kCPU, Values::kChecked);
    const Layout layout = reader.layout(response_mask, cu_seqlens);
    const FocusTensors focus = reader.focus(hidden, visual_mask, layout, prototype, prototype_index);
    const LossInput input = reader.loss(logp, old_logp, advantages, response_mask, layout, ref_logp, entropy,
                                        importance_weights, num_tokens, num_sequences, options);
    const int64_t* groups = reader.tensor<int64_t>("group_ids", group_ids, {layout.batch});
    const WeightsConfig weights_config = reader.config(config);

    const int64_t tokens = layout.num_tokens();
    std::unique_ptr<float[]> cos(new float[tokens]), factors(new float[tokens]), psi(new float[tokens]);
    std::unique_ptr<float[]> w(new float[tokens]), phi(new float[layout.batch]), score(new float[layout.batch]);
    std::unique_ptr<bool[]> has_visual(new bool[layout.batch]);
    const LossTensors result = empty_loss(logp, entropy, int64_t{kPolicyMetrics} + int64_t{kFocusMetrics});
    const LossOutput output = loss_output(result, entropy);
    visual_focus(focus, input.response_mask, cos.get(), has_visual.get());
    visual_weights(cos.get(), input.response_mask, groups, has_visual.get(), focus.layout, weights_config,
                   {factors.get(), psi.get(), w.get(), phi.get(), score.get(), output.metrics + kPolicyMetrics});
    policy_loss(input, factors.get(), output);
    return result;
}

}  // namespace
}  // namespace vgpo::ops

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) { library.impl("vgpo_loss", &vgpo::ops::vgpo_loss); }
