// The stages of the CPU backend on raw pointers, so that vgpo_loss runs them one after the other without a tensor
// between. Shapes: B responses, N tokens ([B, T] padded), R rows of hidden states ([B, S] padded; R = N packed).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "../layout.h"

namespace vgpo {

struct FocusInput {
    const void* hidden;  // [R, D], strided
    HiddenType type;
    HiddenStrides strides;
    int64_t columns;  // D
    Layout layout;
    const bool* visual_mask;         // [R]; null with given prototypes
    const float* prototype;          // [P, D], or null
    const int64_t* prototype_index;  // [B], or null: row b for response b
};

// Means of the visual rows, zeros without any; counts them a response.
void visual_prototype(const FocusInput& input, float* means /* [B, D] */, int64_t* visual_counts /* [B] */);

// Cosines, 0 off the mask; also says which responses have an image.
void visual_focus(const FocusInput& input, const bool* response_mask /* [N] */, float* cos /* [N] */,
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

struct LossInput {
    const float* logp;        // [N]
    const float* old_logp;    // [N]
    const float* advantages;  // [N], or [B] when per response
    bool advantages_per_response;
    const bool* response_mask;        // [N]
    const float* factors;             // [N], or null
    const float* ref_logp;            // [N], or null
    const float* entropy;             // [N], or null
    const float* importance_weights;  // [N], [B] when per response, or null
    bool importance_per_response;
    const float* num_tokens;     // [], or null: the valid tokens
    const float* num_sequences;  // [], or null: B
    Layout layout;
};

struct LossOutput {
    float* loss;          // []
    float* grad_logp;     // [N]
    float* grad_entropy;  // [N], or null
    float* metrics;       // [kPolicyMetrics]
};

void policy_loss(const LossInput& input, const LossOptions& options, const LossOutput& output);

}  // namespace vgpo
