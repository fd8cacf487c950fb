#include <torch/library.h>

#include <cmath>

#include "../arguments.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "stages.h"

namespace vgpo {
namespace {

// Token positions in one piece of work. Sums are taken per piece, then over pieces in order: the same for any number
// of threads.
constexpr int64_t kPiece = 1024;

// The inputs of a piece's valid tokens, side by side, and where its gradient goes.
class PieceTokens {
public:
    PieceTokens(const LossInput& input, const float* factors, int64_t response, int64_t begin, int64_t end)
        : mask_(input.response_mask + begin),
          positions_(end - begin),
          span_(span_of(mask_, positions_)),
          first_(begin + span_.first) {
        tokens.options = input.options;
        tokens.length = span_.count;
        tokens.logp = gathered(input.logp, kLogp);
        tokens.old_logp = gathered(input.old_logp, kOldLogp);
        tokens.advantages = gathered(input.advantages, response, kAdvantages);
        tokens.factors = gathered(factors, kFactors);
        tokens.ref_logp = gathered(input.ref_logp, kRefLogp);
        tokens.entropy = gathered(input.entropy, kEntropy);
        tokens.importance = gathered(input.importance, response, kImportance);
    }

    // Where kernels leave values of the valid tokens side by side in an array of tokens.
    float* place(float* values) const { return values + first_; }
    // Moves those values to the piece's valid tokens, zeros elsewhere.
    void spread_out(float* values) const {
        spread(values + first_ - span_.first, mask_, positions_, span_, 0.0f);
    }

    LossTokens tokens = {};

private:
    // A buffer per array.
    enum Array { kLogp, kOldLogp, kAdvantages, kFactors, kRefLogp, kEntropy, kImportance, kArrays };

    const float* gathered(const float* values, Array array) {
        if (values == nullptr) return nullptr;
        if (!span_.has_holes()) return values + first_;
        compact(values + first_, mask_ + span_.first, span_.extent, buffers_[array]);
        return buffers_[array];
    }
    SpreadInput gathered(const SpreadInput& input, int64_t response, Array array) {
        if (input.per_token) return {gathered(input.values, array), true};
        return {input.values == nullptr ? nullptr : input.values + response, false};
    }

    const bool* mask_;
    int64_t positions_;
    ValidSpan span_;
    int64_t first_;
    float buffers_[kArrays][kPiece];
};

// A batch cut into pieces, with the number of valid tokens of each response.
struct Batch {
    const LossInput& input;
    std::vector<int64_t> counts;  // [B]
    Pieces pieces;

    explicit Batch(const LossInput& loss_input)
        : input(loss_input), counts(loss_input.layout.batch), pieces(lengths(loss_input.layout), kPiece) {
        parallel_items(input.layout.batch, [&](int64_t b) {
            const int64_t begin = input.layout.token_begin(b);
            counts[b] = span_of(input.response_mask + begin, input.layout.token_end(b) - begin).count;
        });
    }

    static std::vector<int64_t> lengths(const Layout& layout) {
        std::vector<int64_t> result(layout.batch);
        for (int64_t b = 0; b < layout.batch; ++b) result[b] = layout.token_end(b) - layout.token_begin(b);
        return result;
    }

    // Calls work(piece, response, first token, end token).
    template <typename Work>
    void for_pieces(const Work& work) const {
        parallel_items(pieces.count(), [&](int64_t piece) {
            const int64_t b = pieces.sequence(piece);
            const int64_t begin = input.layout.token_begin(b) + pieces.begin(piece, b);
            work(piece, b, begin, std::min(begin + kPiece, input.layout.token_end(b)));
        });
    }

    // Adds a value of each piece up for each response.
    template <typename Value>
    std::vector<double> per_response(const Value& value) const {
        std::vector<double> totals(input.layout.batch);
        for (int64_t b = 0; b < input.layout.batch; ++b) {
            for (int64_t piece = pieces.first(b); piece < pieces.first(b + 1); ++piece) totals[b] += value(piece);
        }
        return totals;
    }
};

std::vector<SequenceTerms> sequence_terms(const Batch& batch) {
    const LossInput& input = batch.input;
    const LossOptions& options = input.options;
    const SpreadInput& importance = input.importance;
    const bool corrected = options.vespo() && importance.values != nullptr;
    std::vector<double> sums(batch.pieces.count());
    batch.for_pieces([&](int64_t piece, int64_t b, int64_t begin, int64_t end) {
        const PieceTokens gathered(input, nullptr, b, begin, end);
        const LossTokens& tokens = gathered.tokens;
        sums[piece] = kernels().log_ratio_sum(tokens.logp, tokens.old_logp, tokens.length, summed_limit(options));
        for (int64_t i = 0; corrected && importance.per_token && i < tokens.length; ++i) {
            sums[piece] += log_importance(tokens.importance.values[i], options);
        }
    });
    const std::vector<double> totals = batch.per_response([&](int64_t piece) { return sums[piece]; });
    std::vector<SequenceTerms> terms(totals.size());
    for (size_t b = 0; b < terms.size(); ++b) {
        const bool once = corrected && !importance.per_token;
        const double correction = once ? log_importance(importance.values[b], options) : 0.0;
        terms[b] = vgpo::sequence_terms(totals[b] + correction, batch.counts[b], options);
    }
    return terms;
}

LossSums total_of(const std::vector<LossSums>& pieces) {
    LossSums total;
    for (const LossSums& piece : pieces) {
        total.loss += piece.loss;
        total.clipped_low += piece.clipped_low;
        total.clipped_high += piece.clipped_high;
        total.dual_clipped += piece.dual_clipped;
        total.ratio += piece.ratio;
        total.old_kl += piece.old_kl;
        total.ref_kl += piece.ref_kl;
        total.entropy += piece.entropy;
        total.factors.add(piece.factors);
        total.ratio_min = std::min(total.ratio_min, piece.ratio_min);
        total.ratio_max = std::max(total.ratio_max, piece.ratio_max);
        total.factor_min = std::min(total.factor_min, piece.factor_min);
        total.factor_max = std::max(total.factor_max, piece.factor_max);
        total.tokens += piece.tokens;
        total.nonfinite_advantages += piece.nonfinite_advantages;
    }
    return total;
}

void write_metrics(const LossSums& sums, float* metrics) {
    std::fill_n(metrics, static_cast<int>(kPolicyMetrics), 0.0f);
    if (sums.tokens == 0) return;
    const double number = static_cast<double>(sums.tokens);
    const auto mean = [&](double sum) { return static_cast<float>(sum / number); };
    metrics[kClipFraction] = mean(sums.clipped_low + sums.clipped_high);
    metrics[kClipFractionLow] = mean(sums.clipped_low);
    metrics[kClipFractionHigh] = mean(sums.clipped_high);
    metrics[kDualClipFraction] = mean(sums.dual_clipped);
    metrics[kRatioMean] = mean(sums.ratio);
    metrics[kRatioMin] = unless_nan(metrics[kRatioMean], sums.ratio_min);
    metrics[kRatioMax] = unless_nan(metrics[kRatioMean], sums.ratio_max);
    metrics[kApproxKl] = mean(sums.old_kl);
    metrics[kRefKl] = mean(sums.ref_kl);
    metrics[kEntropy] = mean(sums.entropy);
    metrics[kFactorMean] = static_cast<float>(sums.factors.mean());
    metrics[kFactorMin] = unless_nan(metrics[kFactorMean], sums.factor_min);
    metrics[kFactorMax] = unless_nan(metrics[kFactorMean], sums.factor_max);
    metrics[kFactorStd] = static_cast<float>(sums.factors.deviation());
    metrics[kNumTokens] = static_cast<float>(sums.tokens);
    metrics[kNonfiniteAdvantages] = static_cast<float>(sums.nonfinite_advantages);
}

}  // namespace

void policy_loss(const LossInput& input, const float* factors, const LossOutput& output) {
    const LossOptions& options = input.options;
    const Batch batch(input);
    int64_t valid = 0;
    for (int64_t count : batch.counts) valid += count;
    const float num_tokens = input.num_tokens == nullptr ? static_cast<float>(valid) : *input.num_tokens;
    const float num_sequences =
        input.num_sequences == nullptr ? static_cast<float>(input.layout.batch) : *input.num_sequences;
    std::vector<SequenceTerms> terms(input.layout.batch);
    if (options.sequence_level()) terms = sequence_terms(batch);

    std::vector<LossSums> sums(batch.pieces.count());
    batch.for_pieces([&](int64_t piece, int64_t b, int64_t begin, int64_t end) {
        PieceTokens gathered(input, factors, b, begin, end);
        gathered.tokens.sequence = terms[b];
        gathered.tokens.scale = token_scale(batch.counts[b], num_tokens, num_sequences, options);
        kernels().policy_loss(gathered.tokens, gathered.place(output.grad_logp), sums[piece]);
        gathered.spread_out(output.grad_logp);
        for (int64_t token = begin; output.grad_entropy != nullptr && token < end; ++token) {
            output.grad_entropy[token] =
                input.response_mask[token] ? -options.entropy_coef * gathered.tokens.scale : 0.0f;
        }
    });

    if (options.through_mean()) {
        // Every token moves its response's mean log-ratio by 1 / T_i.
        const auto slopes = batch.per_response([&](int64_t piece) { return sums[piece].sequence_slope; });
        batch.for_pieces([&](int64_t, int64_t b, int64_t begin, int64_t end) {
            const float share = static_cast<float>(slopes[b] / static_cast<double>(batch.counts[b]));
            for (int64_t token = begin; token < end; ++token) {
                output.grad_logp[token] += input.response_mask[token] ? share : 0.0f;
            }
        });
    }
    const LossSums total = total_of(sums);
    *output.loss = static_cast<float>(total.loss);
    write_metrics(total, output.metrics);
}

namespace ops {
namespace {

Tensors policy_loss(const ArgumentReader& reader) {
    const LossInput input = reader.loss(reader.layout("response_mask"));
    const float* factors = reader.data<float>("factors", reader.shape("response_mask"));
    const LossResult result = reader.empty_loss(kPolicyMetrics);
    vgpo::policy_loss(input, factors, result.output);
    return result.tensors;
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("policy_loss", by_name<policy_loss, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
