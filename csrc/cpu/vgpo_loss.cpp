#include <torch/library.h>

#include <memory>

#include "../arguments.h"
#include "stages.h"

namespace vgpo::ops {
namespace {

// The three stages one after the other. Between them stand four arrays of N floats and the prototypes, nothing of
// the size of the hidden states.
Tensors vgpo_loss(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    const FocusTensors focus = reader.focus(layout);
    const LossInput input = reader.loss(layout);
    const int64_t* groups = reader.data<int64_t>("group_ids", {layout.batch});
    const WeightsConfig config = reader.config();
    const LossResult result = reader.empty_loss(int64_t{kPolicyMetrics} + int64_t{kFocusMetrics});

    const int64_t tokens = layout.num_tokens();
    std::unique_ptr<float[]> cos(new float[tokens]), factors(new float[tokens]), psi(new float[tokens]);
    std::unique_ptr<float[]> w(new float[tokens]), phi(new float[layout.batch]), score(new float[layout.batch]);
    visual_focus(focus, input.response_mask, cos.get());
    visual_weights(cos.get(), input.response_mask, groups, nullptr, focus.layout, config,
                   {factors.get(), psi.get(), w.get(), phi.get(), score.get(), result.output.metrics + kPolicyMetrics});
    policy_loss(input, factors.get(), result.output);
    return result.tensors;
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) { library.impl("vgpo_loss", by_name<vgpo_loss, Values::kChecked>()); }

}  // namespace
}  // namespace vgpo::ops
