// The stages of the CPU backend on raw pointers, so that vgpo_loss runs them one after the other without a tensor
// between. Shapes as in inputs.h.
#pragma once

#include <cstdint>

#include "../inputs.h"

namespace vgpo {

// Cosines, 0 off the mask, NaN at tokens that see no image.
void visual_focus(const FocusTensors& input, const bool* response_mask /* [N] */, float* cos /* [N] */);

struct WeightsOutput {
    float* factors;  // [N]
    float* psi;      // [N]
    float* w;        // [N]
    float* phi;      // [B]
    float* score;    // [B]
    float* metrics;  // [kFocusMetrics]
};

void visual_weights(const float* cos /* [N] */, const bool* response_mask /* [N] */, const int64_t* group_ids /* [B] */,
                    const bool* has_visual /* [B], or null: cosines say */, const Layout& layout, const WeightsConfig& config,
                    const WeightsOutput& output);

void policy_loss(const LossInput& input, const float* factors /* [N], or null */, const LossOutput& output);

}  // namespace vgpo
