// The policy losses with per-token advantages: loss, gradient and metrics (Eq. 11 and the losses it plugs into).
//
// A block takes a response; the gradient is written with the loss, in one launch. Per-response partial sums go to the
// workspace, one block adds them up in a fixed order.
//
// Memory traffic: the mask, logp, old_logp and, where given, advantages, factors, ref_logp, entropy and importance
// weights in, the gradients out; 4 bytes a token each. Sequence-level losses read logp and old_logp once more.
#pragma once

#include "visual_weights.cuh"

namespace vgpo {
namespace cuda {

// A value a response or a token.
struct SpreadInput {
    const float* values;  // [B] or [tokens], or null
    bool per_token;

    __device__ float at(int64_t response, int64_t token) const { return values[per_token ? token : response]; }
};

struct PolicyInput {
    Layout layout;
    const float* logp;           // [tokens], as all per-token arrays
    const float* old_logp;
    SpreadInput advantages;
    const bool* response_mask;
    const float* ref_logp;       // or null
    const float* entropy;        // or null
    SpreadInput importance;
    const float* num_tokens;     // [], or null: the valid tokens of this call
    const float* num_sequences;  // [], or null: B
    LossOptions options;
};

struct PolicyOutput {
    float* loss;          // []
    float* grad_logp;     // [tokens]
    float* grad_entropy;  // [tokens], or null
    float* metrics;       // [kPolicyMetrics]

    __device__ void clear(int64_t token) const {
        grad_logp[token] = 0.0f;
        if (grad_entropy != nullptr) grad_entropy[token] = 0.0f;
    }
};

// The loss cancels, so its sum is fp64; the metrics are sums of like terms, at most a few hundred of them a thread and
// a tree from there.
struct PolicySums {
    double loss;
    float ratio;
    float approx_kl;
    float ref_kl;
    float entropy;
    float factor;         // of factor - 1, as the next: factors are close to one
    float factor_square;
    Extremes ratios;
    Extremes factors;
    int32_t tokens;
    int32_t clipped_low, clipped_high, dual_clipped;

    __device__ static PolicySums identity() {
        return {0.0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, Extremes::identity(), Extremes::identity(), 0, 0, 0, 0};
    }
    __device__ void merge(const PolicySums& other) {
        loss += other.loss;
        ratio += other.ratio;
        approx_kl += other.approx_kl;
        ref_kl += other.ref_kl;
        entropy += other.entropy;
        factor += other.factor;
        factor_square += other.factor_square;
        tokens += other.tokens;
        ratios.merge(other.ratios);
        factors.merge(other.factors);
        clipped_low += other.clipped_low;
        clipped_high += other.clipped_high;
        dual_clipped += other.dual_clipped;
    }
};

// ---- a token --------------------------------------------------------------------------------------------------

// What a token adds to the loss before aggregation, and its derivatives: with respect to its own logp, and through the
// ratio of the whole sequence.
struct TokenLoss {
    float value;
    float slope;
    float sequence_slope;
};

__device__ inline TokenLoss token_loss(const PolicyInput& input, int64_t response, int64_t token, float factor,
                                       Ratio<float> sequence_ratio, PolicySums& sums) {
    const LossOptions& options = input.options;
    const float logp = input.logp[token], log_ratio = logp - input.old_logp[token];
    const Ratio<float> token_ratio = importance_ratio(log_ratio, options);
    const bool sequence_level = options.sequence_level();
    const Ratio<float> ratio{sequence_level ? sequence_ratio.value : token_ratio.value,
                             sequence_level ? sequence_ratio.slope : token_ratio.slope};
    const float advantage = input.advantages.at(response, token) * factor;
    const Surrogate<float> policy = surrogate(ratio, logp, advantage, options);
    const float correction = input.importance.values == nullptr
                                 ? 1.0f
                                 : importance_correction(input.importance.at(response, token), options);
    TokenLoss result;
    result.value = correction * policy.value;
    float through_ratio = correction * policy.slope;
    result.slope = 0.0f;
    if (input.ref_logp != nullptr) {
        Kl<float> kl = kl_estimate(logp, input.ref_logp[token], options);
        if (options.kl_bias_correction) {
            through_ratio += options.kl_coef * kl.value * ratio.slope;
            kl = {kl.value * ratio.value, kl.slope * ratio.value};
        }
        result.value += options.kl_coef * kl.value;
        result.slope += options.kl_coef * kl.slope;
        sums.ref_kl += kl.value;
    }
    if (input.entropy != nullptr) {
        const float entropy = input.entropy[token];
        result.value -= options.entropy_coef * entropy;
        sums.entropy += entropy;
    }
    const bool shared = options.loss_type == LossType::kGspo;
    result.slope += shared ? 0.0f : through_ratio;
    result.sequence_slope = shared ? through_ratio : 0.0f;

    const float limited = clamped(log_ratio, -options.ratio_clamp, options.ratio_clamp);
    sums.ratio += ratio.value;
    sums.approx_kl += token_ratio.value - 1.0f - limited;
    sums.factor += factor - 1.0f;
    sums.factor_square += (factor - 1.0f) * (factor - 1.0f);
    sums.ratios.merge(Extremes::of(ratio.value));
    sums.factors.merge(Extremes::of(factor));
    sums.clipped_low += policy.clipped_low != 0.0f;
    sums.clipped_high += policy.clipped_high != 0.0f;
    sums.dual_clipped += policy.dual_clipped != 0.0f;
    return result;
}

// ---- a response -----------------------------------------------------------------------------------------------

// Number of valid tokens of the batch, to every thread of the block.
__device__ inline int64_t total_tokens(const int32_t* token_count, int64_t batch) {
    int64_t total = 0;
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) total += token_count[i];
    return block_sum(total);
}

// A block computes the loss and gradient of a response. `factor(ordinal, token)` is the advantage's factor.
template <typename Factor>
__device__ void response_loss(const PolicyInput& input, const PolicyOutput& output, const ResponseTokens& tokens,
                              int64_t response, float num_tokens, Factor factor, PolicySums& result) {
    const LossOptions& options = input.options;
    const float sequences =
        input.num_sequences == nullptr ? static_cast<float>(input.layout.batch) : *input.num_sequences;
    const float scale = token_scale(tokens.length, num_tokens, sequences, options);
    const float length = static_cast<float>(tokens.length);
    Ratio<float> sequence_ratio{1.0f, 1.0f};
    if (options.sequence_level()) {
        double log_ratio = 0.0;
        for (int ordinal = threadIdx.x; ordinal < tokens.length; ordinal += blockDim.x) {
            const int64_t token = tokens.token(ordinal);
            log_ratio += input.logp[token] - input.old_logp[token];
        }
        const float mean = static_cast<float>(block_sum(log_ratio) / length);
        sequence_ratio = importance_ratio(mean, options);
    }
    PolicySums sums = PolicySums::identity();
    double sequence_slope = 0.0;
    for (int ordinal = threadIdx.x; ordinal < tokens.length; ordinal += blockDim.x) {
        const int64_t token = tokens.token(ordinal);
        const TokenLoss loss = token_loss(input, response, token, factor(ordinal, token), sequence_ratio, sums);
        sums.loss += static_cast<double>(loss.value) * scale;
        sequence_slope += loss.sequence_slope;
        output.grad_logp[token] = loss.slope * scale;
        if (output.grad_entropy != nullptr) output.grad_entropy[token] = -options.entropy_coef * scale;
    }
    if (options.loss_type == LossType::kGspo) {
        // Every token moves the sequence's mean log-ratio by 1 / T.
        const float shared = static_cast<float>(block_sum(sequence_slope) / length) * scale;
        for (int ordinal = threadIdx.x; ordinal < tokens.length; ordinal += blockDim.x) {
            output.grad_logp[tokens.token(ordinal)] += shared;
        }
    }
    sums = block_reduce(sums);
    sums.tokens = tokens.length;
    if (threadIdx.x == 0) result = sums;
}

// All responses, a block each, once the tokens are listed. The caller puts a grid barrier before the metrics.
// `response_factor(response)` is called by whole blocks and gives the `factor` of response_loss.
template <typename ResponseFactor>
__device__ void response_losses(const PolicyInput& input, const PolicyOutput& output, const FocusWorkspace& lists,
                                PolicySums* results, ResponseFactor response_factor) {
    const float num_tokens = input.num_tokens != nullptr
                                 ? *input.num_tokens
                                 : static_cast<float>(total_tokens(lists.token_count, input.layout.batch));
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        response_loss(input, output, response_tokens(input.layout, lists, response), response, num_tokens,
                      response_factor(response), results[response]);
    }
}

// ---- loss and metrics -----------------------------------------------------------------------------------------

// A block adds up the responses and writes the loss and the metrics.
__device__ inline void write_policy_metrics(const PolicySums* responses, int64_t batch, const PolicyOutput& output) {
    PolicySums sums = PolicySums::identity();
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) sums.merge(responses[i]);
    sums = block_reduce(sums);
    if (threadIdx.x != 0) return;
    *output.loss = static_cast<float>(sums.loss);
    const bool any = sums.tokens > 0;
    const double tokens = static_cast<double>(any ? sums.tokens : 1);
    const double factor_offset = sums.factor / tokens;
    const double variance = sums.factor_square / tokens - factor_offset * factor_offset;
    float* metrics = output.metrics;
    metrics[kClipFraction] = static_cast<float>((sums.clipped_low + sums.clipped_high) / tokens);
    metrics[kClipFractionLow] = static_cast<float>(sums.clipped_low / tokens);
    metrics[kClipFractionHigh] = static_cast<float>(sums.clipped_high / tokens);
    metrics[kDualClipFraction] = static_cast<float>(sums.dual_clipped / tokens);
    metrics[kRatioMean] = static_cast<float>(sums.ratio / tokens);
    metrics[kRatioMin] = any ? sums.ratios.low : 0.0f;
    metrics[kRatioMax] = any ? sums.ratios.high : 0.0f;
    metrics[kApproxKl] = static_cast<float>(sums.approx_kl / tokens);
    metrics[kRefKl] = static_cast<float>(sums.ref_kl / tokens);
    metrics[kEntropy] = static_cast<float>(sums.entropy / tokens);
    metrics[kFactorMean] = any ? static_cast<float>(1.0 + factor_offset) : 0.0f;
    metrics[kFactorMin] = any ? sums.factors.low : 0.0f;
    metrics[kFactorMax] = any ? sums.factors.high : 0.0f;
    metrics[kFactorStd] = static_cast<float>(sqrt(variance > 0.0 ? variance : 0.0));
    metrics[kNumTokens] = static_cast<float>(sums.tokens);
}

// ---- kernel ---------------------------------------------------------------------------------------------------

struct PolicyLossArguments {
    PolicyInput input;
    const float* factors;   // [tokens], or null: all one
    FocusWorkspace lists;   // of tokens alone
    PolicySums* responses;  // [B]
    PolicyOutput output;
};

template <typename Arena>
void bind(PolicyLossArguments& arguments, Arena& arena) {
    bind_tokens(arguments.lists, arena, arguments.input.layout);
    arguments.responses = arena.template take<PolicySums>("policy_sums", arguments.input.layout.batch);
}

inline int64_t useful_blocks(const PolicyLossArguments& arguments) { return arguments.input.layout.batch; }

template <int kBlock>
__global__ void __launch_bounds__(kBlock, kBlocksPerMultiprocessor)
    policy_loss_kernel(const __grid_constant__ PolicyLossArguments arguments) {
    const PolicyInput& input = arguments.input;
    const PolicyOutput& output = arguments.output;
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        index_tokens(input.layout, input.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                     response, [&](int64_t token) { output.clear(token); });
    }
    grid_sync();
    const float* factors = arguments.factors;
    response_losses(input, output, arguments.lists, arguments.responses, [=](int64_t) {
        return [=](int64_t, int64_t token) { return factors == nullptr ? 1.0f : factors[token]; };
    });
    grid_sync();
    if (blockIdx.x == 0) write_policy_metrics(arguments.responses, input.layout.batch, output);
}

}  // namespace cuda
}  // namespace vgpo
