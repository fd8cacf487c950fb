// The family's token shaping on the CPU: a thread per response, and one per group where a selection spans responses.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <memory>

#include "../arguments.h"
#include "groups.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "selection.h"

namespace vgpo {
namespace {

constexpr int kSignals = 3;

// Per token, in the order of the operator's arguments; null where not given.
struct SignalInput {
    const float* of[kSignals];  // visual, entropy, gap
};

struct ShapingOutput {
    float* factors;          // [N]
    float* weights;          // [N]
    bool* selected;          // [N]
    float* response_factor;  // [B]
    float* score;            // [B]
    float* metrics;          // [kShapingMetrics]
};

// One response on its way through the stages.
struct Response {
    ValidSpan span;
    int64_t first = 0;    // ordinal of the first token that counts
    bool shaped = false;  // some count, and their signals are finite
    bool broken = false;
    ResponseSignals signals = {};
    double visual_sum = 0.0;
    const float* visual_score = nullptr;  // what top_visual goes by
    Cut by_visual, by_entropy;
    int64_t selected = 0;

    Run visual_run() const { return {visual_score, signals.length}; }
    Run entropy_run() const { return {signals.entropy, signals.length}; }
};

float magnitude(const Extremes& range) { return std::max(std::fabs(range.low), std::fabs(range.high)); }

// Cuts one signal of the responses of a segment, order[begin] ... order[end - 1].
void cut_segment(std::vector<Response>& responses, const std::vector<int64_t>& order, size_t begin, size_t end,
                 double fraction, Run (Response::*run)() const, Cut Response::*cut) {
    std::vector<Run> runs;
    int64_t number = 0;
    for (size_t i = begin; i < end; ++i) {
        runs.push_back((responses[order[i]].*run)());
        number += runs.back().length;
    }
    const std::vector<Cut> cuts = cuts_of(runs, top_count(number, fraction));
    for (size_t i = begin; i < end; ++i) responses[order[i]].*cut = cuts[i - begin];
}

// Both selections, of the tokens in each scope.
void cut(std::vector<Response>& responses, const int64_t* group_ids, const ShapingConfig& config) {
    const int64_t* ids = config.scope == SelectionScope::kGroup ? group_ids : nullptr;
    const std::vector<int64_t> order = by_group(
        ids, static_cast<int64_t>(responses.size()), [&](int64_t b) { return responses[b].shaped; });
    std::vector<std::pair<size_t, size_t>> segments;
    if (config.scope == SelectionScope::kResponse) {
        for (size_t i = 0; i < order.size(); ++i) segments.emplace_back(i, i + 1);
    } else {
        for_each_group(order, ids, [&](size_t begin, size_t end) { segments.emplace_back(begin, end); });
    }
    parallel_items(2 * static_cast<int64_t>(segments.size()), [&](int64_t item) {
        const auto& [begin, end] = segments[item / 2];
        if (item % 2 == 0 && config.top_visual > 0.0) {
            cut_segment(responses, order, begin, end, config.top_visual, &Response::visual_run, &Response::by_visual);
        }
        if (item % 2 == 1 && config.top_entropy > 0.0) {
            cut_segment(responses, order, begin, end, config.top_entropy, &Response::entropy_run,
                        &Response::by_entropy);
        }
    });
}

// Reads one response: its signals at the tokens that count, side by side, and their sum. Of a mask with holes they are
// compacted to `room`, an array for each; what top_visual goes by goes to `scores` where it is not the visual signal.
void read(const SignalInput& input, const bool* mask, int64_t begin, int64_t length, const ShapingConfig& config,
          float* const (&room)[kSignals], float* scores, Response& response) {
    const ValidSpan span = response.span = span_of(mask, length);
    const float* values[kSignals] = {};
    for (int s = 0; s < kSignals; ++s) {
        if (input.of[s] == nullptr) continue;
        values[s] = input.of[s] + begin + span.first;
        if (!span.has_holes()) continue;
        compact(values[s], mask + span.first, span.extent, room[s] + begin);
        values[s] = room[s] + begin;
    }
    while (response.first < span.count && std::isnan(values[0][response.first])) ++response.first;
    ResponseSignals& signals = response.signals;
    signals.length = span.count - response.first;
    if (signals.length == 0) return;

    const float** to[kSignals] = {&signals.visual, &signals.entropy, &signals.gap};
    Extremes* ranges[kSignals] = {&signals.visual_range, &signals.entropy_range, &signals.gap_range};
    for (int s = 0; s < kSignals; ++s) {
        if (values[s] == nullptr) continue;
        *to[s] = values[s] + response.first;
        *ranges[s] = kernels().extremes(*to[s], signals.length);
        response.broken |= !ranges[s]->finite;
    }
    response.shaped = !response.broken;
    if (!response.shaped) return;
    const double scale = fixed_scale_of(magnitude(signals.visual_range));
    response.visual_sum = static_cast<double>(kernels().fixed_total(signals.visual, signals.length, scale)) / scale;
    response.visual_score = signals.visual;
    if (config.fuses() || config.times_entropy) {
        kernels().visual_scores(signals, config, scores + begin);
        response.visual_score = scores + begin;
    }
}

// Writes weights and factors of a shaped response's counted tokens, side by side, and which of them are selected.
void weigh(Response& response, float response_factor, float progress, const ShapingConfig& config, bool* by_visual,
           bool* by_entropy, float* weights, float* factors) {
    const int64_t length = response.signals.length;
    if (config.weight == TokenWeight::kSoftmax) {
        kernels().softmax_weights(response.signals, config, weights);
    } else if (config.weight == TokenWeight::kGate) {
        kernels().gate_weights(response.signals, config, weights);
    } else {
        std::fill_n(weights, length, 1.0f);
    }
    if (!config.selects()) {
        std::fill_n(by_visual, length, true);
        response.selected = length;
        for (int64_t i = 0; i < length; ++i) {
            weights[i] = faded_in(weights[i], progress, config);
            factors[i] = weights[i] * response_factor;
        }
        return;
    }
    std::fill_n(by_visual, length, false);
    std::fill_n(by_entropy, length, false);
    int64_t chosen = 0;
    if (config.top_visual > 0.0) chosen = choose(response.visual_run(), response.by_visual, by_visual);
    if (config.top_entropy > 0.0) choose(response.entropy_run(), response.by_entropy, by_entropy);
    float split[4];  // by visual, plus 2 by entropy
    for (int which = 0; which < 4; ++which) split[which] = selection_weight(which & 1, which & 2, config);
    if (config.weight == TokenWeight::kShare) {
        const SharedWeights shared = shared_weights(length, chosen, config);
        split[0] = shared.others;
        split[1] = shared.chosen;
    }
    const float unseen = config.response_on == Weighed::kAll ? response_factor : 1.0f;
    int64_t selected = 0;
    for (int64_t i = 0; i < length; ++i) {
        weights[i] = faded_in(weights[i] * split[by_visual[i] + 2 * by_entropy[i]], progress, config);
        factors[i] = weights[i] * (by_visual[i] ? response_factor : unseen);
        by_visual[i] |= by_entropy[i];
        selected += by_visual[i];
    }
    response.selected = selected;
}

// The mean of numbers of either sign, the same bits in whatever order.
float mean_of(const std::vector<float>& values) {
    float largest = 0.0f;
    for (const float value : values) largest = std::max(largest, std::fabs(value));
    const double scale = fixed_scale_of(largest);
    int64_t sum = 0;
    for (const float value : values) sum += to_fixed(value, scale);
    return mean_from_fixed(sum, scale, static_cast<int64_t>(values.size()));
}

// Of an even number the lower of both.
float median_of(std::vector<float> values) {
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

// Replaces the scores of responses that are compared by their factors.
void compare(std::vector<float>& values, const ShapingConfig& config) {
    const auto [lowest, highest] = std::minmax_element(values.begin(), values.end());
    const float low = *lowest, high = *highest;
    if (config.response == ResponseWeight::kMinMax) {
        for (float& value : values) value = min_max_unit(value, low, high);
        const float mean = mean_of(values);
        for (float& value : values) value = min_max_factor(value, mean, low, high, config);
        return;
    }
    const bool robust = config.response == ResponseWeight::kMedianMad;
    const float centre = robust ? median_of(values) : mean_of(values);
    std::vector<float> spread;
    for (float& value : values) {
        value -= centre;
        spread.push_back(robust ? std::fabs(value) : value * value);
    }
    if (robust) {
        const float deviation = median_of(spread);
        for (float& value : values) value = median_factor(value, deviation, config);
        return;
    }
    const float deviation = std::sqrt(mean_of(spread));
    const float most = response_power(high - centre, deviation, config);
    for (float& value : values) value = exponential(response_power(value, deviation, config) - most);
    const float mean = mean_of(values);
    for (float& value : values) value /= mean;
}

void response_factors(const float* score, const int64_t* group_ids, int64_t batch, float progress,
                      const ShapingConfig& config, float* factors) {
    std::fill_n(factors, batch, 1.0f);
    if (config.response == ResponseWeight::kNone) return;
    const int64_t* ids = config.response_scope == ResponseScope::kGroup ? group_ids : nullptr;
    const std::vector<int64_t> order = by_group(ids, batch, [&](int64_t b) { return is_finite(score[b]); });
    for_each_group(order, ids, [&](size_t begin, size_t end) {
        std::vector<float> values;
        for (size_t i = begin; i < end; ++i) values.push_back(score[order[i]]);
        compare(values, config);
        for (size_t i = begin; i < end; ++i) factors[order[i]] = faded_in(values[i - begin], progress, config);
    });
}

void write_metrics(const std::vector<Response>& responses, float* metrics) {
    double sum = 0.0;
    int64_t tokens = 0, selected = 0, shaped = 0, broken = 0;
    for (const Response& response : responses) {
        broken += response.broken;
        if (!response.shaped) continue;
        ++shaped;
        sum += response.visual_sum;
        tokens += response.signals.length;
        selected += response.selected;
    }
    // The mean of nothing is NaN.
    metrics[kSignalMean] = static_cast<float>(sum / static_cast<double>(tokens));
    metrics[kSelectedRate] = static_cast<float>(static_cast<double>(selected) / static_cast<double>(tokens));
    metrics[kShapedResponses] = static_cast<float>(shaped);
    metrics[kNonfiniteSignals] = static_cast<float>(broken);
}

void token_shaping(const SignalInput& input, const bool* response_mask, const int64_t* group_ids, const Layout& layout,
                   float progress, const ShapingConfig& config, const ShapingOutput& output) {
    std::vector<Response> responses(layout.batch);
    // Untouched, and so without a page, where masks have no holes and scores are the visual signal.
    const int64_t tokens = layout.num_tokens();
    std::unique_ptr<float[]> room(new float[(kSignals + 1) * tokens]);
    float* const rooms[kSignals] = {room.get(), room.get() + tokens, room.get() + 2 * tokens};
    parallel_items(layout.batch, [&](int64_t b) {
        Response& response = responses[b];
        const int64_t begin = layout.token_begin(b), length = layout.token_end(b) - begin;
        read(input, response_mask + begin, begin, length, config, rooms, room.get() + kSignals * tokens, response);
        output.score[b] = response.shaped ? static_cast<float>(response.visual_sum / response.signals.length)
                                          : std::numeric_limits<float>::quiet_NaN();
    });
    if (config.selects()) cut(responses, group_ids, config);
    response_factors(output.score, group_ids, layout.batch, progress, config, output.response_factor);

    parallel_items(layout.batch, [&](int64_t b) {
        Response& response = responses[b];
        const int64_t begin = layout.token_begin(b), length = layout.token_end(b) - begin;
        const bool* mask = response_mask + begin;
        float *weights = output.weights + begin, *factors = output.factors + begin;
        bool* selected = output.selected + begin;
        if (!response.shaped) {
            std::fill_n(weights, length, 1.0f);
            std::fill_n(factors, length, 1.0f);
            std::copy_n(mask, length, selected);
            return;
        }
        const ValidSpan& span = response.span;
        const float factor = output.response_factor[b];
        const int64_t first = response.first;
        std::unique_ptr<bool[]> chosen(new bool[2 * span.count + 1]);
        // Tokens that saw no image.
        std::fill_n(chosen.get(), first, true);
        std::fill_n(weights + span.first, first, 1.0f);
        std::fill_n(factors + span.first, first, config.response_on == Weighed::kAll ? factor : 1.0f);
        weigh(response, factor, progress, config, chosen.get() + first, chosen.get() + span.count + 1,
              weights + span.first + first, factors + span.first + first);
        spread(weights, mask, length, span, 1.0f);
        spread(factors, mask, length, span, 1.0f);
        spread(chosen.get(), mask, length, span, selected);
    });
    write_metrics(responses, output.metrics);
}

}  // namespace

namespace ops {
namespace {

Tensors token_shaping(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    const at::IntArrayRef tokens = reader.shape("response_mask"), each(layout.batch);
    const SignalInput signals = {{reader.data<float>("visual", tokens), reader.data<float>("entropy", tokens),
                                  reader.data<float>("gap", tokens)}};
    const bool* mask = reader.data<bool>("response_mask", tokens);
    const int64_t* groups = reader.data<int64_t>("group_ids", each);
    const ShapingConfig config = reader.shaping();
    TORCH_CHECK_VALUE(reader.has("entropy") || !config.reads_entropy(), "entropy is None, which this config reads");
    TORCH_CHECK_VALUE(reader.has("gap") || !config.fuses(), "gap is None, which this config reads");
    const auto progress = static_cast<float>(reader.value<double>("progress"));
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, reader.tensor("visual").options()); };
    at::Tensor factors = empty(tokens), weights = empty(tokens);
    at::Tensor selected = at::empty(tokens, reader.tensor("response_mask").options());
    at::Tensor response_factor = empty(each), score = empty(each), metrics = empty({kShapingMetrics});
    const ShapingOutput output = {factors.mutable_data_ptr<float>(),  weights.mutable_data_ptr<float>(),
                                  selected.mutable_data_ptr<bool>(),  response_factor.mutable_data_ptr<float>(),
                                  score.mutable_data_ptr<float>(),    metrics.mutable_data_ptr<float>()};
    vgpo::token_shaping(signals, mask, groups, layout, progress, config, output);
    return {factors, weights, selected, response_factor, score, metrics};
}

Tensors response_factors(const ArgumentReader& reader) {
    const at::IntArrayRef each = reader.shape("score");
    TORCH_CHECK_VALUE(each.size() == 1, "score must have shape [B], got ", each);
    const float* score = reader.data<float>("score", each);
    const int64_t* groups = reader.data<int64_t>("group_ids", each);
    const auto progress = static_cast<float>(reader.value<double>("progress"));
    at::Tensor factors = at::empty(each, reader.tensor("score").options());
    vgpo::response_factors(score, groups, each[0], progress, reader.shaping(), factors.mutable_data_ptr<float>());
    return {factors};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("token_shaping", by_name<token_shaping, Values::kChecked>());
    library.impl("response_factors", by_name<response_factors, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
