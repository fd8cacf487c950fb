// The stages of the CPU backend on raw pointers, so that vgpo_loss runs them one after the other without a tensor
// between. Shapes as in inputs.h.
#pragma once

#include <cstdint>

#include "../inputs.h"

namespace vgpo {

// Means of the visual rows, zeros without any; counts them per response.
void visual_prototype(const FocusTensors& input, float* means /* [B, D] */, int64_t* visual_counts /* [B] */);

// Cosines, 0 off the mask; also says which responses have an image.
void visual_focus(const FocusTensors& input, const bool* response_mask /* [N] */, float* cos /* [N] */,
                  bool* has_visual /* [B] */);

struct WeightsOutput {
    float* factors;  // [N]
    float* psi;      // [N]
    float* w;        // [N]
    float* phi;      // [B]
    float* score;    // [B]
    float* metrics;  // [kFocusMetrics]
};

void visual_weights(const float* cos /* [N] */, const bool* response_mask /* [N] */, const int64_t* group_ids /* [B] */,
                    const bool* has_visual /* [B], or null: all */, const Layout& layout, const WeightsConfig& config,
                    const WeightsOutput& output);

void group_weights(const float* score /* [B] */, const int64_t* group_ids /* [B] */, const bool* member /* [B] */,
                   int64_t batch, const WeightsConfig& config, float* phi /* [B] */);

void policy_loss(const LossInput& input, const float* factors /* [N], or null */, const LossOutput& output);

}  // namespace vgpo
