// The vectorised kernels of the CPU backend as a table of functions, one table for each instruction set. They work
// on raw pointers, know nothing of threads or torch, and see valid tokens only: callers compact masks away first,
// so that where a remainder begins depends on the number of tokens alone, never on their layout.
#pragma once

#include <cstdint>

#include "../inputs.h"
#include "../logit_map.h"
#include "../logit_statistics.h"
#include "../shaping_math.h"

namespace vgpo {

// What visual_weights keeps of one response.
struct ResponseWeights {
    float score;  // s_i
    double cos_sum;
    int64_t gated;  // tokens whose gate is open
    double early_sum, late_sum;  // of rho, before and from ordinal ceil(T / 2)
};

// The smallest and the largest of some numbers, infinity and minus infinity without one; and whether all are finite, if
// not, the others mean nothing.
struct Extremes {
    float low, high;
    bool finite;
};

// The signals of one response at the tokens that count, side by side; null where not given.
struct ResponseSignals {
    const float *visual, *entropy, *gap;
    Extremes visual_range, entropy_range, gap_range;
    int64_t length;
};

// Valid tokens of one response for the policy loss, side by side. Arrays hold `length` values, and those of a value per
// response one; layout, mask and numbers of the batch are not set.
struct LossTokens : LossInput {
    const float* factors;  // null: all one
    SequenceTerms sequence;  // of the response; read by sequence-level losses
    float scale;             // what a token counts in the loss
    int64_t length;
};

// Sums over tokens, from which loss and metrics are made.
struct LossSums {
    double loss = 0.0;  // already scaled
    double clipped_low = 0.0, clipped_high = 0.0, dual_clipped = 0.0;
    double ratio = 0.0, old_kl = 0.0, ref_kl = 0.0, entropy = 0.0;
    FactorMoments factors = {1.0, 0.0, 0.0, 0.0};
    double sequence_slope = 0.0;  // through_mean(): d loss / d mean log-ratio
    float ratio_min = std::numeric_limits<float>::infinity(), ratio_max = -std::numeric_limits<float>::infinity();
    float factor_min = std::numeric_limits<float>::infinity(), factor_max = -std::numeric_limits<float>::infinity();
    int64_t tokens = 0, nonfinite_advantages = 0;
};

// What turns a row of logits into their gradient, as head_gradient defines it.
struct LogitGradient {
    float maximum, log_sum, scale, slope, at_target;
    int64_t target;  // its column; outside [0, columns): none
};

// Products of the two views of a token before some columns.
struct PairRow {
    const float* products[2];
    const float* bias[2];  // null: none
    LogitMap map;
    int64_t target;  // its column; outside [0, columns): none
};

// What turns the logits of both views into their gradients, and where those go.
struct PairGradient {
    ViewGradient view[2];
    void* out[2];
};

struct Kernels {
    const char* name;

    // total[c] = the sum over rows of hidden[positions[r] * stride + c], c < columns, with `room` for 2 * columns
    // floats. The order of additions depends on `rows` alone: how columns are split over calls does not change a bit.
    void (*sum_rows[kHiddenTypes])(const void* hidden, const int64_t* positions, int64_t rows, int64_t stride,
                                   int64_t columns, float* room, float* total);
    // The same of rows as unit vectors, which have to be whole.
    void (*sum_unit_rows[kHiddenTypes])(const void* hidden, const int64_t* positions, int64_t rows, int64_t stride,
                                        int64_t columns, float* room, float* total);
    // A prototype in the order in which `cosines` reads the columns of a hidden type.
    void (*arrange[kHiddenTypes])(const float* prototype, int64_t columns, float* arranged);
    // Cosine of each row with an arranged prototype of the given norm. Every row is summed in the same fixed order.
    void (*cosines[kHiddenTypes])(const void* hidden, const int64_t* positions, int64_t rows, int64_t stride,
                                  int64_t columns, const float* prototype, float prototype_norm, float* cos);
    float (*norm)(const float* values, int64_t length);

    // The smallest value; infinity without one.
    float (*smallest)(const float* values, int64_t length);
    // Whether all cosines can be weighted.
    bool (*all_signals)(const float* cos, int64_t length);
    // Compensation and intra-trajectory re-weighting of one response of `length` tokens, from the cosines of those from
    // the ordinal `first` on, which all are signals; the others are not touched. `keys` has room for `length` values
    // rounded up to kKeyPadding.
    ResponseWeights (*response_weights)(const float* cos, int64_t first, int64_t length, float offset,
                                        const WeightsConfig& config, int32_t* keys, float* w, float* psi);
    void (*factors)(const float* psi, int64_t length, float phi, const WeightsConfig& config, float* factors);

    Extremes (*extremes)(const float* values, int64_t length);
    // The sum of values in fixed point.
    int64_t (*fixed_total)(const float* values, int64_t length, double scale);
    // Token weights before any is selected: TokenWeight::kSoftmax and kGate.
    void (*softmax_weights)(const ResponseSignals& signals, const ShapingConfig& config, float* weights);
    void (*gate_weights)(const ResponseSignals& signals, const ShapingConfig& config, float* weights);
    // What top_visual goes by, where it is not the visual signal.
    void (*visual_scores)(const ResponseSignals& signals, const ShapingConfig& config, float* scores);

    // The sum of log-ratios, each bounded by +-limit.
    double (*log_ratio_sum)(const float* logp, const float* old_logp, int64_t length, float limit);
    // Writes the sums of a piece and d loss / d logp; without the share that goes through the mean log-ratio.
    void (*policy_loss)(const LossTokens& tokens, float* grad_logp, LossSums& sums);

    // A panel of up to kPanelKeys keys, in an order of the table's own, with room for size * kPanelKeys floats.
    void (*pack_keys[kHiddenTypes])(const void* keys, const int64_t* offsets, int64_t count, int64_t size,
                                    float* panel);
    // scores[r * kPanelKeys + j] = scale * <query r, key j> of up to kQueryRows queries, `room` being scratch for
    // kQueryRows * size floats. A score is summed in fp32 and in a fixed order, whatever stands beside it.
    void (*attention_scores[kHiddenTypes])(const void* queries, const int64_t* offsets, int64_t rows,
                                           const float* panel, int64_t keys, int64_t size, float scale, float* room,
                                           float* scores);
    // Whether BLAS multiplies faster, with what it finds in the processor, than attention_scores does.
    bool scores_by_blas;
    // Rows of `size` components side by side in fp32.
    void (*widen_rows[kHiddenTypes])(const void* data, const int64_t* offsets, int64_t count, int64_t size,
                                     float* rows);
    // Streaming softmax: adds e^(score - largest) of a query's visible keys [begin, end) of a panel to the sum of
    // their segment, after raising `largest` and shrinking the sums as needed. Scores outside are overwritten.
    void (*softmax_update)(float* scores, int64_t begin, int64_t end, float* largest, float* sums, int64_t segments,
                           int64_t segment);
    // Scores to probabilities e^(score - lse), in place.
    void (*probabilities)(float* scores, int64_t begin, int64_t end, float lse);
    void (*add_probabilities)(const float* scores, int64_t begin, int64_t end, float lse, float weight,
                              float* totals);

    // Takes the logits of products plus bias into a row's statistics. `bias` may be null. [1] keeps the sum of
    // e^2(z - maximum) in `squares`, too.
    void (*logit_statistics[2])(const float* products, const float* bias, int64_t columns, const LogitMap& map,
                                LogitStatistics& statistics, float* squares);
    // Gradient by the logits, times the slope of a cap, in float or bfloat16 (kFloat, kBFloat16); it may take the
    // products' place.
    void (*logit_gradient[2])(const float* products, const float* bias, int64_t columns, const LogitMap& map,
                              const LogitGradient& row, void* gradient);

    // The same of two views of a token.
    void (*pair_statistics)(const PairRow& row, int64_t columns, PairStatistics& statistics);
    // Adds the columns' shares in sums over the vocabulary.
    void (*pair_shares)(const PairRow& row, int64_t columns, const PairNormalisers& totals, float js_beta,
                        PairShares& shares);
    // Gradients by the logits of both views, as logit_gradient.
    void (*pair_gradient[2])(const PairRow& row, int64_t columns, const PairNormalisers& totals,
                             const PairGradient& gradient, float js_beta);

    // Reads memory as fast as the processor can: the ceiling that benchmarks compare with.
    float (*read)(const float* values, int64_t length);
};

constexpr int64_t kKeyPadding = 16;
// Keys of a panel (32 KiB at a head size of 128: it stays in the first-level cache) and queries of a tile.
constexpr int64_t kPanelKeys = 64;
constexpr int64_t kQueryRows = 6;

// The table in use: the best that this processor runs, or the one chosen by VGPO_SIMD or choose_kernels.
const Kernels& kernels();
// The tables this processor runs, the simplest first; null-terminated.
const Kernels* const* available_kernels();
// Returns false if there is no such table here.
bool choose_kernels(const char* name);

extern const Kernels* const portable_kernels;
// Null where they were not compiled.
extern const Kernels* const avx2_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const neon_kernels;
extern const Kernels* const neon_bf16_kernels;

}  // namespace vgpo
