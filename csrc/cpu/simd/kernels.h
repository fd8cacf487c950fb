// Every kernel over the vector type that the including file has just defined, and their table. Include inside that
// vector's namespace and its region of instruction-set pragmas, with VGPO_SIMD_NAME defined. No include guard: each
// instruction set includes it once.

#include "vector_math.h"

#include "focus_kernels.h"
#include "weights_kernels.h"
#include "shaping_kernels.h"

#include "attention_kernels.h"
#include "logit_kernels.h"
#include "divergence_kernels.h"
#include "loss_kernels.h"

constexpr Kernels kTable = {
    VGPO_SIMD_NAME,
    {sum_rows<float, false>, sum_rows<BFloat16, false>, sum_rows<Half, false>},
    {sum_rows<float, true>, sum_rows<BFloat16, true>, sum_rows<Half, true>},
    {arrange<float>, arrange<BFloat16>, arrange<Half>},
    {cosines<float>, cosines<BFloat16>, cosines<Half>},
    norm,
    smallest,
    all_signals,
    response_weights,
    factors,
    extremes,
    fixed_total,
    softmax_weights,
    gate_weights,
    visual_scores,
    log_ratio_sum,
    policy_loss,
    {pack_keys<float>, pack_keys<BFloat16>, pack_keys<Half>},
    {attention_scores<float>, attention_scores<BFloat16>, attention_scores<Half>},
    false,
    {widen_rows<float>, widen_rows<BFloat16>, widen_rows<Half>},
    softmax_update,
    probabilities,
    add_probabilities,
    {logit_statistics<false>, logit_statistics<true>},
    {logit_gradient<float>, logit_gradient<BFloat16>},
    pair_statistics,
    pair_shares,
    {pair_gradient<float>, pair_gradient<BFloat16>},
    read,
};
