// The policy losses with per-token advantages: loss, gradient and metrics (Eq. 11 and the losses it plugs into).
//
// A warp takes a piece of a response, 64 tokens by ordinal, so that long responses spread over the chip as many short
// ones do; the gradient is written with the loss, in one launch. The sums of a piece go to the workspace, and the last
// block to finish adds them up in an order that only their number decides.
//
// Memory traffic: the mask, logp, old_logp and, where given, advantages, factors, ref_logp, entropy and importance
// weights in, the gradients out; 4 bytes per token each. Sequence-level losses read logp and old_logp once more.
#pragma once

#include "../inputs.h"
#include "visual_weights.cuh"

namespace vgpo {
namespace cuda {

// The loss cancels, and so does the variance of factors, so their sums are fp64; the other metrics are sums of like
// terms, at most a few hundred of them per lane and a tree from there.
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

__device__ inline PolicySums warp_reduce(PolicySums sums) {
    sums.loss = warp_sum(sums.loss);
    sums.factor = warp_sum(sums.factor);
    sums.factor_square = warp_sum(sums.factor_square);
    sums.ratio = warp_sum(sums.ratio);
    sums.approx_kl = warp_sum(sums.approx_kl);
    sums.ref_kl = warp_sum(sums.ref_kl);
    sums.entropy = warp_sum(sums.entropy);
    sums.ratios = warp_reduce(sums.ratios);
    sums.factor_range = warp_reduce(sums.factor_range);
    sums.tokens = warp_sum(sums.tokens);
    sums.nonfinite_advantages = warp_sum(sums.nonfinite_advantages);
    sums.clipped_low = warp_sum(sums.clipped_low);
    sums.clipped_high = warp_sum(sums.clipped_high);
    sums.dual_clipped = warp_sum(sums.dual_clipped);
    return sums;
}

// ---- a token --------------------------------------------------------------------------------------------------

// What a token adds to the loss before aggregation, and its derivatives: w.r.t. its own logp, and through the
// ratio of the whole sequence.
struct TokenLoss {
    float value;
    float slope;
    float sequence_slope;
};

// What is read of a token. What is not given is read as something else, which nobody uses: no condition stands between
// the loads, so they go out together.
struct TokenInput {
    float logp, old_logp, advantage, importance, ref_logp, entropy;
    float of_factor;  // as the advantage's factor has it (see piece_loss)
};

__device__ inline const float* or_else(const float* given, const float* other) {
    return given != nullptr ? given : other;
}

template <typename Factor>
__device__ __forceinline__ TokenInput load_token(const LossInput& input, int64_t response, int ordinal, int64_t token,
                                                 const Factor& factor) {
    const SpreadInput &advantages = input.advantages, &importance = input.importance;
    const int64_t place = importance.values == nullptr || importance.per_token ? token : response;
    TokenInput loaded;
    loaded.logp = input.logp[token];
    loaded.old_logp = input.old_logp[token];
    loaded.advantage = advantages.at(response, token);
    loaded.importance = or_else(importance.values, input.logp)[place];
    loaded.ref_logp = or_else(input.ref_logp, input.logp)[token];
    loaded.entropy = or_else(input.entropy, input.logp)[token];
    loaded.of_factor = factor.load(ordinal, token);
    return loaded;
}

__device__ inline TokenLoss token_loss(const LossInput& input, const TokenInput& loaded, float factor,
                                       double factor_origin, const SequenceTerms& sequence,
                                       Ratio<float> sequence_ratio, PolicySums& sums) {
    const LossOptions& options = input.options;
    const float logp = loaded.logp, log_ratio = logp - loaded.old_logp;
    const Ratio<float> token_ratio = importance_ratio(log_ratio, options);
    const bool of_sequence = options.sequence_ratio();
    const Ratio<float> ratio{of_sequence ? sequence_ratio.value : token_ratio.value,
                             of_sequence ? sequence_ratio.constant : token_ratio.constant};
    const float advantage = loaded.advantage * factor;
    Surrogate<float> term = surrogate(ratio, logp, advantage, sequence, options);
    if (input.importance.values != nullptr && !options.vespo()) {
        apply_importance(term, importance_correction(loaded.importance, options), advantage);
    }
    float direct = 0.0f;  // derivative w.r.t. logp other than through the ratio
    if (input.ref_logp != nullptr) {
        const Kl<float> kl = kl_estimate(logp, loaded.ref_logp, options);
        sums.ref_kl += add_kl(term, direct, kl, ratio, options);
    }
    if (input.entropy != nullptr) {
        subtract_bonus(term, loaded.entropy, options);
        sums.entropy += loaded.entropy;
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

constexpr int kPieceTokens = 64;
constexpr int kMaxPieces = 256;  // a longer response gets longer pieces, not more

constexpr __host__ __device__ int piece_tokens(int length) {
    return kPieceTokens * ceil_div(length, kPieceTokens * kMaxPieces);
}

constexpr __host__ __device__ int piece_count(int length) {
    return length == 0 ? 0 : ceil_div(length, piece_tokens(length));
}

// The most pieces a batch can have.
inline int64_t max_pieces(const Layout& layout) {
    const int64_t capped = layout.batch * kMaxPieces;
    const int64_t by_tokens = layout.cu_seqlens == nullptr
                                  ? layout.batch * ceil_div<int64_t>(layout.tokens, kPieceTokens)
                                  : layout.tokens / kPieceTokens + layout.batch;
    return by_tokens < capped ? by_tokens : capped;
}

struct LossWorkspace {
    PolicySums* sums = nullptr;           // [pieces]
    double* log_ratio_sums = nullptr;     // [pieces] of sequence-level losses
    double* sequence_slopes = nullptr;    // [pieces] of losses through the mean
    unsigned* finished = nullptr;         // [] blocks; `begin_loss` makes it zero
};

inline void bind_loss(LossWorkspace& workspace, Arena& arena, const Layout& layout, const LossOptions& options) {
    workspace.finished = arena.take<unsigned>("finished", 1);
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

    // An ordinal, or the last one in place of those beyond it.
    __device__ int clamped(int ordinal) const { return ordinal < last ? ordinal : last - 1; }
    __device__ int64_t token(int ordinal) const { return tokens.token(clamped(ordinal)); }
};

// Calls body(piece) for this warp's share of the pieces. Whole warps call it.
template <typename Body>
__device__ void for_each_piece(const Layout& layout, const FocusWorkspace& lists, Body body) {
    const int32_t* counts = lists.token_count;
    auto cursor = ragged_cursor(layout.batch, [=](int response) { return piece_count(counts[response]); });
    for (int item = grid_warp(); cursor.seek(item); item += grid_warps()) {
        const ResponseTokens tokens = response_tokens(layout, lists, cursor.response());
        const int size = piece_tokens(tokens.length), first = (item - cursor.begin()) * size;
        const int last = first + size < tokens.length ? first + size : tokens.length;
        const int end = cursor.begin() + piece_count(tokens.length);
        body(Piece{item, cursor.response(), first, last, cursor.begin(), end, tokens});
    }
}

// The sum of a response's pieces, in an order that their number decides.
__device__ inline double sum_of_pieces(const double* sums, const Piece& piece) {
    double total = 0.0;
    for (int i = piece.begin + lane_index(); i < piece.end; i += kWarpSize) total += sums[i];
    return warp_sum(total);
}

// Number of valid tokens of the batch, to every lane of the warp.
__device__ inline int64_t total_tokens(const int32_t* token_count, int64_t batch) {
    int64_t total = 0;
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) total += token_count[i];
    return warp_sum(total);
}

// What a token of a response counts in the loss.
__device__ inline float scale_of(const LossInput& input, int length, float num_tokens) {
    const float sequences =
        input.num_sequences == nullptr ? static_cast<float>(input.layout.batch) : *input.num_sequences;
    return token_scale(length, num_tokens, sequences, input.options);
}

// A warp computes the loss and gradient of a piece. `factor` is the advantage's: of a token that is factor.load(ordinal,
// token), handed to factor.of(loaded, ordinal) after factor.prepare(), which need not wait for the token.
template <typename Factor>
__device__ void piece_loss(const LossInput& input, const LossOutput& output, const LossWorkspace& workspace,
                           const Piece& piece, float num_tokens, Factor factor) {
    const LossOptions& options = input.options;
    const auto load = [&](int ordinal, int64_t token) {
        return load_token(input, piece.response, piece.clamped(ordinal), token, factor);
    };
    // A step behind the last one repeats the piece's last token, which is not used.
    const int own = piece.first + lane_index();
    int64_t token = piece.token(own), next_token = piece.token(own + kWarpSize);
    TokenInput loaded = load(own, token);
    factor.prepare();
    const float scale = scale_of(input, piece.tokens.length, num_tokens);
    SequenceTerms sequence{0.0f, 0.0f, 0.0f};
    if (options.sequence_level()) {
        double sum = sum_of_pieces(workspace.log_ratio_sums, piece);
        const bool corrected = options.vespo() && input.importance.values != nullptr && !input.importance.per_token;
        if (corrected) sum += log_importance(input.importance.values[piece.response], options);
        sequence = sequence_terms(sum, piece.tokens.length, options);
    }
    const Ratio<float> sequence_ratio = importance_ratio(sequence.mean_log_ratio, options);
    const float first_factor = factor.of(loaded.of_factor, piece.clamped(own));
    const float origin = factor_origin(__shfl_sync(kAllLanes, first_factor, 0));
    PolicySums sums = PolicySums::identity();
    double sequence_slope = 0.0;
#pragma unroll 1
    for (int first = piece.first; first < piece.last; first += kWarpSize) {
        const int ordinal = first + lane_index();
        // The next step's inputs are on their way while this one computes.
        const TokenInput next = load(ordinal + kWarpSize, next_token);
        const int64_t after_next = piece.token(ordinal + 2 * kWarpSize);
        if (ordinal < piece.last) {
            const TokenLoss loss = token_loss(input, loaded, factor.of(loaded.of_factor, ordinal), origin, sequence,
                                              sequence_ratio, sums);
            sums.loss += static_cast<double>(loss.value) * scale;
            sequence_slope += loss.sequence_slope;
            output.grad_logp[token] = loss.slope * scale;
            if (output.grad_entropy != nullptr) output.grad_entropy[token] = -options.entropy_coef * scale;
        }
        loaded = next;
        token = next_token;
        next_token = after_next;
    }
    sums = warp_reduce(sums);
    sums.factor_origin = origin;
    sums.tokens = piece.last - piece.first;
    if (lane_index() == 0) workspace.sums[piece.index] = sums;
    if (options.through_mean()) {
        sequence_slope = warp_sum(sequence_slope);
        if (lane_index() == 0) workspace.sequence_slopes[piece.index] = sequence_slope;
    }
}

// What tokens bring is on its way while their lists are made.
__device__ inline void prefetch_loss(const LossInput& input) {
    const int64_t tokens = input.layout.num_tokens();
    prefetch_tokens(input.logp, tokens);
    prefetch_tokens(input.old_logp, tokens);
    prefetch_tokens(input.ref_logp, tokens);
    prefetch_tokens(input.entropy, tokens);
    if (input.advantages.per_token) prefetch_tokens(input.advantages.values, tokens);
    if (input.importance.per_token) prefetch_tokens(input.importance.values, tokens);
}

// To be called before the grid barrier that precedes batch_loss.
__device__ inline void begin_loss(const LossWorkspace& workspace) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *workspace.finished = 0;
}

// The losses and gradients of the whole batch, once the tokens are listed. True for one block, the last to finish: all
// sums are there for its metrics. `response_factor(response)` gives the `factor` of piece_loss.
template <typename ResponseFactor>
__device__ bool batch_loss(const LossInput& input, const LossOutput& output, const FocusWorkspace& lists,
                           const LossWorkspace& workspace, ResponseFactor response_factor) {
    const LossOptions& options = input.options;
    if (options.sequence_level()) {
        const float limit = summed_limit(options);
        const bool corrected = options.vespo() && input.importance.values != nullptr && input.importance.per_token;
        const float* importance = corrected ? input.importance.values : input.logp;
        for_each_piece(input.layout, lists, [&](const Piece& piece) {
            double sum = 0.0;
#pragma unroll 2
            for (int first = piece.first; first < piece.last; first += kWarpSize) {
                const int ordinal = first + lane_index();
                const int64_t token = piece.token(ordinal);
                const float log_ratio = input.logp[token] - input.old_logp[token], weight = importance[token];
                if (ordinal >= piece.last) continue;
                sum += clamped(log_ratio, -limit, limit);
                if (corrected) sum += log_importance(weight, options);
            }
            sum = warp_sum(sum);
            if (lane_index() == 0) workspace.log_ratio_sums[piece.index] = sum;
        });
        grid_sync();
    }
    const float num_tokens = input.num_tokens != nullptr
                                 ? *input.num_tokens
                                 : static_cast<float>(total_tokens(lists.token_count, input.layout.batch));
    for_each_piece(input.layout, lists, [&](const Piece& piece) {
        piece_loss(input, output, workspace, piece, num_tokens, response_factor(piece.response));
    });
    if (options.through_mean()) {
        grid_sync();
        for_each_piece(input.layout, lists, [&](const Piece& piece) {
            // Every token moves the sequence's mean log-ratio by 1 / T.
            const double slope = sum_of_pieces(workspace.sequence_slopes, piece) / piece.tokens.length;
            const float shared = static_cast<float>(slope) * scale_of(input, piece.tokens.length, num_tokens);
            for (int ordinal = piece.first + lane_index(); ordinal < piece.last; ordinal += kWarpSize) {
                output.grad_logp[piece.tokens.token(ordinal)] += shared;
            }
        });
    }
    return is_last_block(workspace.finished, gridDim.x);
}

// ---- loss and metrics -----------------------------------------------------------------------------------------

// A block adds up the pieces, and its first warp writes the loss and the metrics.
__device__ inline void write_policy_metrics(const PolicySums* pieces, const int32_t* token_count, int64_t batch,
                                            const LossOutput& output) {
    int count = 0;
    for (int64_t i = lane_index(); i < batch; i += kWarpSize) count += piece_count(token_count[i]);
    count = warp_sum(count);
    PolicySums sums = PolicySums::identity();
    const float origin = count > 0 ? pieces[0].factor_origin : 1.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        PolicySums piece = pieces[i];
        const FactorMoments moved = piece.factors().moved_to(origin);
        piece.factor = moved.sum;
        piece.factor_square = moved.squares;
        sums.merge(piece);
    }
    sums = reduce_to_first_warp(sums, warp_index() * kWarpSize < count);
    sums.factor_origin = origin;
    if (threadIdx.x != 0) return;
    *output.loss = static_cast<float>(sums.loss);
    const bool any = sums.tokens > 0;
    const double share = 1.0 / (any ? sums.tokens : 1);
    const FactorMoments factors = sums.factors();
    const auto ratio_mean = static_cast<float>(sums.ratio * share);
    const float factor_mean = any ? static_cast<float>(factors.mean()) : 0.0f;
    float* metrics = output.metrics;
    metrics[kClipFraction] = static_cast<float>((sums.clipped_low + sums.clipped_high) * share);
    metrics[kClipFractionLow] = static_cast<float>(sums.clipped_low * share);
    metrics[kClipFractionHigh] = static_cast<float>(sums.clipped_high * share);
    metrics[kDualClipFraction] = static_cast<float>(sums.dual_clipped * share);
    metrics[kRatioMean] = ratio_mean;
    metrics[kRatioMin] = any ? unless_nan(ratio_mean, sums.ratios.low) : 0.0f;
    metrics[kRatioMax] = any ? unless_nan(ratio_mean, sums.ratios.high) : 0.0f;
    metrics[kApproxKl] = static_cast<float>(sums.approx_kl * share);
    metrics[kRefKl] = static_cast<float>(sums.ref_kl * share);
    metrics[kEntropy] = static_cast<float>(sums.entropy * share);
    metrics[kFactorMean] = factor_mean;
    metrics[kFactorMin] = any ? unless_nan(factor_mean, sums.factor_range.low) : 0.0f;
    metrics[kFactorMax] = any ? unless_nan(factor_mean, sums.factor_range.high) : 0.0f;
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
    constexpr int kWarps = 4;  // of a block have work before another block is worth its barrier
    const int64_t pieces = ceil_div<int64_t>(max_pieces(arguments.input.layout), kWarps);
    return pieces > arguments.input.layout.batch ? pieces : arguments.input.layout.batch;
}

// Factors that are given, or 1.
struct GivenFactor {
    const float* factors;  // [tokens], or null
    const float* other;    // [tokens]

    __device__ void prepare() {}
    __device__ float load(int, int64_t token) const { return or_else(factors, other)[token]; }
    __device__ float of(float loaded, int) const { return factors == nullptr ? 1.0f : loaded; }
};

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 1)
    policy_loss_kernel(const __grid_constant__ PolicyLossArguments arguments) {
    const LossInput& input = arguments.input;
    const LossOutput& output = arguments.output;
    begin_loss(arguments.workspace);
    for (int64_t response = blockIdx.x; response < input.layout.batch; response += gridDim.x) {
        index_tokens(input.layout, input.response_mask, arguments.lists.token_index, arguments.lists.token_count,
                     response, [&](int64_t token) { output.clear(token); });
    }
    prefetch_loss(input);
    prefetch_tokens(arguments.factors, input.layout.num_tokens());
    grid_sync();
    const GivenFactor factor{arguments.factors, input.logp};
    if (!batch_loss(input, output, arguments.lists, arguments.workspace, [=](int) { return factor; })) return;
    write_policy_metrics(arguments.workspace.sums, arguments.lists.token_count, input.layout.batch, output);
}

}  // namespace cuda
}  // namespace vgpo
