// The policy losses with per-token advantages: loss, gradient and metrics (Eq. 11 and the losses it plugs into).
//
// A block takes a piece of a response, 2,048 tokens by ordinal, so that long responses spread over the chip as many
// short ones do; the gradient is written with the loss, in one launch. The sums of a piece go to the workspace and are
// added up in the order of the pieces.
//
// Memory traffic: the mask, logp, old_logp and, where given, advantages, factors, ref_logp, entropy and importance
// weights in, the gradients out; 4 bytes per token each. Sequence-level losses read logp and old_logp once more.
#pragma once

#include "../inputs.h"
#include "visual_weights.cuh"

namespace vgpo {
namespace cuda {

// The loss cancels, and so does the variance of factors, so their sums are fp64; the other metrics are sums of like
// terms, at most a few hundred of them per thread and a tree from there.
struct PolicySums {
    double loss;
    double factor, factor_square;  // of factors less their origin, which is not summed
    float factor_origin;           // of a piece
    float ratio;
    float approx_kl;
    float ref_kl;
    float entropy;
    Extremes ratios;
    Extremes factor_range;
    int32_t tokens, nonfinite_advantages;
    int32_t clipped_low, clipped_high, dual_clipped;

    __device__ static PolicySums identity() {
        return {0.0,  0.0,  0.0, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, Extremes::identity(), Extremes::identity(),
                0, 0, 0, 0, 0};
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
        nonfinite_advantages += other.nonfinite_advantages;
        ratios.merge(other.ratios);
        factor_range.merge(other.factor_range);
        clipped_low += other.clipped_low;
        clipped_high += other.clipped_high;
        dual_clipped += other.dual_clipped;
    }
    __device__ FactorMoments factors() const {
        return {factor_origin, static_cast<double>(tokens), factor, factor_square};
    }
};

// ---- a token --------------------------------------------------------------------------------------------------

// What a token adds to the loss before aggregation, and its derivatives: w.r.t. its own logp, and through the
// ratio of the whole sequence.
struct TokenLoss {
    float value;
    float slope;
    float sequence_slope;
};

__device__ inline TokenLoss token_loss(const LossInput& input, int64_t response, int64_t token, float factor,
                                       double factor_origin, const SequenceTerms& sequence,
                                       Ratio<float> sequence_ratio, PolicySums& sums) {
    const LossOptions& options = input.options;
    const float logp = input.logp[token], log_ratio = logp - input.old_logp[token];
    const Ratio<float> token_ratio = importance_ratio(log_ratio, options);
    const bool of_sequence = options.sequence_ratio();
    const Ratio<float> ratio{of_sequence ? sequence_ratio.value : token_ratio.value,
                             of_sequence ? sequence_ratio.constant : token_ratio.constant};
    const float advantage = input.advantages.at(response, token) * factor;
    Surrogate<float> term = surrogate(ratio, logp, advantage, sequence, options);
    if (input.importance.values != nullptr && !options.vespo()) {
        apply_importance(term, importance_correction(input.importance.at(response, token), options), advantage);
    }
    float direct = 0.0f;  // derivative w.r.t. logp other than through the ratio
    if (input.ref_logp != nullptr) {
        const Kl<float> kl = kl_estimate(logp, input.ref_logp[token], options);
        sums.ref_kl += add_kl(term, direct, kl, ratio, options);
    }
    if (input.entropy != nullptr) {
        const float entropy = input.entropy[token];
        subtract_bonus(term, entropy, options);
        sums.entropy += entropy;
    }
    const bool shared = options.through_mean();
    const TokenLoss result{term.value, direct + (shared ? 0.0f : term.slope), shared ? term.slope : 0.0f};

    const float limited = clamped(log_ratio, -options.ratio_clamp, options.ratio_clamp);
    sums.ratio += ratio.value;
    const double deviation = factor - factor_origin;
    sums.approx_kl += exponential_excess(limited, token_ratio.value);
    sums.factor += deviation;
    sums.factor_square += deviation * deviation;
    sums.ratios.merge(Extremes::of(ratio.value));
    sums.factor_range.merge(Extremes::of(factor));
    sums.nonfinite_advantages += !is_finite(advantage);
    sums.clipped_low += term.clipped_low != 0.0f;
    sums.clipped_high += term.clipped_high != 0.0f;
    sums.dual_clipped += term.dual_clipped != 0.0f;
    return result;
}

// ---- pieces of responses --------------------------------------------------------------------------------------

constexpr int kPieceTokens = 2048;

constexpr __host__ __device__ int piece_count(int length) { return ceil_div(length, kPieceTokens); }

// The most pieces a batch can have.
inline int64_t max_pieces(const Layout& layout) {
    if (layout.cu_seqlens == nullptr) return layout.batch * ceil_div<int64_t>(layout.tokens, kPieceTokens);
    return layout.tokens / kPieceTokens + layout.batch;
}

struct LossWorkspace {
    PolicySums* sums = nullptr;           // [pieces]
    double* log_ratio_sums = nullptr;     // [pieces] of sequence-level losses
    double* sequence_slopes = nullptr;    // [pieces] of losses through the mean
};

inline void bind_loss(LossWorkspace& workspace, Arena& arena, const Layout& layout, const LossOptions& options) {
    workspace.sums = arena.take<PolicySums>("policy_sums", max_pieces(layout));
    if (!options.sequence_level()) return;
    workspace.log_ratio_sums = arena.take<double>("log_ratio_sums", max_pieces(layout));
    workspace.sequence_slopes = arena.take<double>("sequence_slopes", max_pieces(layout));
}

// A piece of a response: ordinals [first, last).
struct Piece {
    int index;           // among all pieces
    int response;
    int first, last;
    int begin, end;      // the pieces of its response
    ResponseTokens tokens;
};

// Calls body(piece) for this block's share of the pieces. Whole blocks call it.
template <typename Body>
__device__ void for_each_piece(const Layout& layout, const FocusWorkspace& lists, Body body) {
    const int32_t* counts = lists.token_count;
    auto cursor = ragged_cursor(layout.batch, [=](int response) { return piece_count(counts[response]); });
    for (int item = blockIdx.x; cursor.seek(item); item += gridDim.x) {
        const ResponseTokens tokens = response_tokens(layout, lists, cursor.response());
        const int first = (item - cursor.begin()) * kPieceTokens;
        const int last = first + kPieceTokens < tokens.length ? first + kPieceTokens : tokens.length;
        const int end = cursor.begin() + piece_count(tokens.length);
        body(Piece{item, cursor.response(), first, last, cursor.begin(), end, tokens});
    }
}

// The sum of a response's pieces, in order.
__device__ inline double sum_of_pieces(const double* sums, const Piece& piece) {
    double total = 0.0;
    for (int i = piece.begin; i < piece.end; ++i) total += sums[i];
    return total;
}

// Number of valid tokens of the batch, to every thread of the block.
__device__ inline int64_t total_tokens(const int32_t* token_count, int64_t batch) {
    int64_t total = 0;
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) total += token_count[i];
    return block_sum(total);
}

// What a token of a response counts in the loss.
__device__ inline float scale_of(const LossInput& input, int length, float num_tokens) {
    const float sequences =
        input.num_sequences == nullptr ? static_cast<float>(input.layout.batch) : *input.num_sequences;
    return token_scale(length, num_tokens, sequences, input.options);
}

// A block computes the loss and gradient of a piece. `factor(ordinal, token)` is the advantage's factor.
template <typename Factor>
__device__ void piece_loss(const LossInput& input, const LossOutput& output, const LossWorkspace& workspace,
                           const Piece& piece, float num_tokens, Factor factor) {
    const LossOptions& options = input.options;
    const float scale = scale_of(input, piece.tokens.length, num_tokens);
    SequenceTerms sequence{0.0f, 0.0f, 0.0f};
    if (options.sequence_level()) {
        double sum = sum_of_pieces(workspace.log_ratio_sums, piece);
        const bool corrected = options.vespo() && input.importance.values != nullptr && !input.importance.per_token;
        if (corrected) sum += log_importance(input.importance.values[piece.response], options);
        sequence = sequence_terms(sum, piece.tokens.length, options);
    }
    const Ratio<float> sequence_ratio = importance_ratio(sequence.mean_log_ratio, options);
    const float origin = factor_origin(factor(piece.first, piece.tokens.token(piece.first)));
    PolicySums sums = PolicySums::identity();
    double sequence_slope = 0.0;
    for (int ordinal = piece.first + static_cast<int>(threadIdx.x); ordinal < piece.last; ordinal += blockDim.x) {
        const int64_t token = piece.tokens.token(ordinal);
        const TokenLoss loss =
            token_loss(input, piece.response, token, factor(ordinal, token), origin, sequence, sequence_ratio, sums);
        sums.loss += static_cast<double>(loss.value) * scale;
        sequence_slope += loss.sequence_slope;
        output.grad_logp[token] = loss.slope * scale;
        if (output.grad_entropy != nullptr) output.grad_entropy[token] = -options.entropy_coef * scale;
    }
    sums = block_reduce(sums);
    sums.factor_origin = origin;
    sums.tokens = piece.last - piece.first;
    if (threadIdx.x == 0) workspace.sums[piece.index] = sums;
    if (options.through_mean()) {
        sequence_slope = block_sum(sequence_slope);
        if (threadIdx.x == 0) workspace.sequence_slopes[piece.index] = sequence_slope;
    }
}

// The losses and gradients of the whole batch, once the tokens are listed. The caller puts a grid barrier before the
// metrics. `response_factor(response)` is called by whole blocks and gives the `factor` of piece_loss.
template <typename ResponseFactor>
__device__ void batch_loss(const LossInput& input, const LossOutput& output, const FocusWorkspace& lists,
                           const LossWorkspace& workspace, ResponseFactor response_factor) {
    const LossOptions& options = input.options;
    if (options.sequence_level()) {
        const float limit = summed_limit(options);
        const bool corrected = options.vespo() && input.importance.values != nullptr && input.importance.per_token;
        for_each_piece(input.layout, lists, [&](const Piece& piece) {
            double sum = 0.0;
            for (int ordinal = piece.first + static_cast<int>(threadIdx.x); ordinal < piece.last;
                 ordinal += blockDim.x) {
                const int64_t token = piece.tokens.token(ordinal);
                sum += clamped(input.logp[token] - input.old_logp[token], -limit, limit);
                if (corrected) sum += log_importance(input.importance.values[token], options);
            }
            sum = block_sum(sum);
            if (threadIdx.x == 0) workspace.log_ratio_sums[piece.index] = sum;
        });
        grid_sync();
    }
    const float num_tokens = input.num_tokens != nullptr
                                 ? *input.num_tokens
                                 : static_cast<float>(total_tokens(lists.token_count, input.layout.batch));
    for_each_piece(input.layout, lists, [&](const Piece& piece) {
        piece_loss(input, output, workspace, piece, num_tokens, response_factor(piece.response));
    });
    if (!options.through_mean()) return;
    grid_sync();
    for_each_piece(input.layout, lists, [&](const Piece& piece) {
        // Every token moves the sequence's mean log-ratio by 1 / T.
        const double slope = sum_of_pieces(workspace.sequence_slopes, piece) / piece.tokens.length;
        const float shared = static_cast<float>(slope) * scale_of(input, piece.tokens.length, num_tokens);
        for (int ordinal = piece.first + static_cast<int>(threadIdx.x); ordinal < piece.last; ordinal += blockDim.x) {
            output.grad_logp[piece.tokens.token(ordinal)] += shared;
        }
    });
}

// ---- loss and metrics -----------------------------------------------------------------------------------------

// A block adds up the pieces and writes the loss and the metrics.
__device__ inline void write_policy_metrics(const PolicySums* pieces, const int32_t* token_count, int64_t batch,
                                            const LossOutput& output) {
    int count = 0;
    for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) count += piece_count(token_count[i]);
    count = block_sum(count);
    PolicySums sums = PolicySums::identity();
    const float origin = count > 0 ? pieces[0].factor_origin : 1.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        PolicySums piece = pieces[i];
        const FactorMoments moved = piece.factors().moved_to(origin);
        piece.factor = moved.sum;
        piece.factor_square = moved.squares;
        sums.merge(piece);
    }
    sums = block_reduce(sums);
    sums.factor_origin = origin;
    if (threadIdx.x != 0) return;
    *output.loss = static_cast<float>(sums.loss);
    const bool any = sums.tokens > 0;
    const double tokens = static_cast<double>(any ? sums.tokens : 1);
    const FactorMoments factors = sums.factors();
    float* metrics = output.metrics;
    metrics[kClipFraction] = static_cast<float>((sums.clipped_low + sums.clipped_high) / tokens);
    metrics[kClipFractionLow] = static_cast<float>(sums.clipped_low / tokens);
    metrics[kClipFractionHigh] = static_cast<float>(sums.clipped_high / tokens);
    metrics[kDualClipFraction] = static_cast<float>(sums.dual_clipped / tokens);
    metrics[kRatioMean] = static_cast<float>(sums.ratio / tokens);
    metrics[kRatioMin] = any ? unless_nan(metrics[kRatioMean], sums.ratios.low) : 0.0f;
    metrics[kRatioMax] = any ? unless_nan(metrics[kRatioMean], sums.ratios.high) : 0.0f;
    metrics[kApproxKl] = static_cast<float>(sums.approx_kl / tokens);
    metrics[kRefKl] = static_cast<float>(sums.ref_kl / tokens);
    metrics[kEntropy] = static_cast<float>(sums.entropy / tokens);
    metrics[kFactorMean] = any ? static_cast<float>(factors.mean()) : 0.0f;
    metrics[kFactorMin] = any ? unless_nan(metrics[kFactorMean], sums.factor_range.low) : 0.0f;
    metrics[kFactorMax] = any ? unless_nan(metrics[kFactorMean], sums.factor_range.high) : 0.0f;
    metrics[kFactorStd] = any ? static_cast<float>(factors.deviation()) : 0.0f;
    metrics[kNumTokens] = static_cast<float>(sums.tokens);
    metrics[kNonfiniteAdvantages] = static_cast<float>(sums.nonfinite_advantages);
}

// ---- kernel ---------------------------------------------------------------------------------------------------

struct PolicyLossArguments {
    LossInput input;
    const float* factors;   // [tokens], or null: all one
    FocusWorkspace lists;   // of tokens alone
    LossWorkspace workspace;
    LossOutput output;
};

inline void bind(PolicyLossArguments& arguments, Arena& arena) {
    bind_tokens(arguments.lists, arena, arguments.input.layout);
    bind_loss(arguments.workspace, arena, arguments.input.layout, arguments.input.options);
}

inline int64_t useful_blocks(const PolicyLossArguments& arguments) {
    const int64_t pieces = max_pieces(arguments.input.layout);
    return pieces > arguments.input.layout.batch ? pieces : arguments.input.layout.batch;
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    policy_loss_kernel(const __grid_constant__ PolicyLossArguments arguments) {
    const LossInput& input = arguments.input;
    const LossOutput& output = arguments.output;
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        index_tokens(input.layout, input.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                     response, [&](int64_t token) { output.clear(token); });
    }
    grid_sync();
    const float* factors = arguments.factors;
    batch_loss(input, output, arguments.lists, arguments.workspace, [=](int) {
        return [=](int, int64_t token) { return factors == nullptr ? 1.0f : factors[token]; };
    });
    grid_sync();
    if (blockIdx.x != 0) return;
    write_policy_metrics(arguments.workspace.sums, arguments.lists.token_count, input.layout.batch, output);
}

}  // namespace cuda
}  // namespace vgpo
