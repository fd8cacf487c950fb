#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>

#include "../arguments.h"
#include "groups.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "stages.h"

namespace vgpo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One response on its way through the stages.
struct Response {
    ValidSpan span;
    const float* cos = nullptr;      // its valid cosines, side by side
    int64_t first = 0;               // ordinal of the first token that sees an image
    bool nonfinite = false;          // it has an image, and a cosine that is no signal
    bool weighted = false;           // it has an image, a token that sees it, and only signals from there
    float smallest_cos = kInfinity;  // of a weighted response
    ResponseWeights weights = {};
};

void group_weights(const float* score, const int64_t* group_ids, const std::vector<int64_t>& order, int64_t batch,
                   const WeightsConfig& config, float* phi) {
    std::fill_n(phi, batch, 0.0f);
    if (!config.inter) return;
    for_each_group(order, group_ids, [&](size_t begin, size_t end) {
        float low = kInfinity, high = -kInfinity;
        for (size_t i = begin; i < end; ++i) {
            low = std::min(low, score[order[i]]);
            high = std::max(high, score[order[i]]);
        }
        int64_t sum = 0;
        for (size_t i = begin; i < end; ++i) {
            phi[order[i]] = min_max_normalized(score[order[i]], low, high);
            sum += to_fixed(phi[order[i]], kUnitScale);
        }
        const float mean = mean_from_fixed(sum, kUnitScale, static_cast<int64_t>(end - begin));
        for (size_t i = begin; i < end; ++i) phi[order[i]] -= mean;
    });
}

void write_metrics(const std::vector<Response>& responses, const std::vector<int64_t>& order,
                   const int64_t* group_ids, float* metrics) {
    double cos_sum = 0.0, ratio_sum = 0.0;
    int64_t tokens = 0, gated = 0, ratios = 0, nonfinite = 0, groups = 0, singletons = 0;
    for (const Response& response : responses) {
        nonfinite += response.nonfinite;
        if (!response.weighted) continue;
        cos_sum += response.weights.cos_sum;
        gated += response.weights.gated;
        tokens += response.span.count - response.first;
        const int64_t half = (response.span.count + 1) / 2, late_from = std::max(half, response.first);
        const int64_t early = late_from - response.first, late = response.span.count - late_from;
        if (late > 0 && response.weights.early_sum > 0.0) {
            ratio_sum += (response.weights.late_sum / static_cast<double>(late)) /
                         (response.weights.early_sum / static_cast<double>(early));
            ++ratios;
        }
    }
    for_each_group(order, group_ids, [&](size_t begin, size_t end) {
        ++groups;
        singletons += end - begin == 1;
    });
    // The mean of nothing is NaN.
    const auto share = [](double sum, int64_t number) { return static_cast<float>(sum / static_cast<double>(number)); };
    metrics[kFocusMean] = share(cos_sum, tokens);
    metrics[kGateRate] = share(static_cast<double>(gated), tokens);
    metrics[kLateEarlyRatio] = share(ratio_sum, ratios);
    metrics[kWeightedResponses] = static_cast<float>(order.size());
    metrics[kNonfiniteResponses] = static_cast<float>(nonfinite);
    metrics[kGroups] = static_cast<float>(groups);
    metrics[kSingletonGroups] = static_cast<float>(singletons);
}

}  // namespace

void visual_weights(const float* cos, const bool* response_mask, const int64_t* group_ids, const bool* has_visual,
                    const Layout& layout, const WeightsConfig& config, const WeightsOutput& output) {
    std::vector<Response> responses(layout.batch);
    parallel_items(layout.batch, [&](int64_t b) {
        Response& response = responses[b];
        const int64_t begin = layout.token_begin(b), length = layout.token_end(b) - begin;
        const bool* mask = response_mask + begin;
        const ValidSpan span = response.span = span_of(mask, length);
        if (has_visual != nullptr && !has_visual[b]) return;
        response.cos = cos + begin + span.first;
        if (span.has_holes()) {
            // The factors come last: until then their place holds the compacted cosines.
            compact(response.cos, mask + span.first, span.extent, output.factors + begin);
            response.cos = output.factors + begin;
        }
        while (response.first < span.count && std::isnan(response.cos[response.first])) ++response.first;
        const float* seeing = response.cos + response.first;
        const int64_t count = span.count - response.first;
        response.nonfinite = !kernels().all_signals(seeing, count);
        response.weighted = count > 0 && !response.nonfinite;
        if (response.weighted && config.needs_batch_offset()) response.smallest_cos = kernels().smallest(seeing, count);
    });

    float offset = config.score_offset;
    if (config.needs_batch_offset()) {
        offset = 0.0f;
        for (const Response& response : responses) offset = std::min(offset, response.smallest_cos);
    }

    parallel_items(layout.batch, [&](int64_t b) {
        Response& response = responses[b];
        const int64_t begin = layout.token_begin(b), length = layout.token_end(b) - begin;
        float *w = output.w + begin, *psi = output.psi + begin;
        if (response.weighted) {
            const ValidSpan& span = response.span;
            std::vector<int32_t> keys(span.count + kKeyPadding);
            std::fill_n(w + span.first, response.first, 0.0f);
            std::fill_n(psi + span.first, response.first, 0.0f);
            response.weights = kernels().response_weights(response.cos, response.first, span.count, offset, config,
                                                          keys.data(), w + span.first, psi + span.first);
            spread(w, response_mask + begin, length, span, 0.0f);
        } else {
            std::fill_n(w, length, 0.0f);
            std::fill_n(psi, length, 0.0f);
        }
        output.score[b] = response.weighted ? response.weights.score : std::numeric_limits<float>::quiet_NaN();
    });

    const auto member = [&](int64_t b) { return responses[b].weighted; };
    const std::vector<int64_t> order = by_group(group_ids, layout.batch, member);
    group_weights(output.score, group_ids, order, layout.batch, config, output.phi);

    parallel_items(layout.batch, [&](int64_t b) {
        const int64_t begin = layout.token_begin(b), length = layout.token_end(b) - begin;
        if (!responses[b].weighted) {
            std::fill_n(output.factors + begin, length, 1.0f);
            return;
        }
        const ValidSpan& span = responses[b].span;
        float *factors = output.factors + begin, *psi = output.psi + begin;
        kernels().factors(psi + span.first, span.count, output.phi[b], config, factors + span.first);
        spread(factors, response_mask + begin, length, span, 1.0f);
        spread(psi, response_mask + begin, length, span, 0.0f);
    });
    write_metrics(responses, order, group_ids, output.metrics);
}

namespace ops {
namespace {

Tensors visual_weights(const ArgumentReader& reader) {
    const Layout layout = reader.layout("response_mask");
    const at::IntArrayRef tokens = reader.shape("response_mask"), each(layout.batch);
    const float* cos = reader.data<float>("cos", tokens);
    const bool* mask = reader.data<bool>("response_mask", tokens);
    const int64_t* groups = reader.data<int64_t>("group_ids", each);
    const bool* images = reader.data<bool>("has_visual", each);
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, reader.tensor("cos").options()); };
    at::Tensor factors = empty(tokens), psi = empty(tokens), w = empty(tokens);
    at::Tensor phi = empty(each), score = empty(each), metrics = empty({kFocusMetrics});
    const WeightsOutput output = {
        factors.mutable_data_ptr<float>(), psi.mutable_data_ptr<float>(),   w.mutable_data_ptr<float>(),
        phi.mutable_data_ptr<float>(),     score.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>()};
    vgpo::visual_weights(cos, mask, groups, images, layout, reader.config(), output);
    return {factors, psi, w, phi, score, metrics};
}

Tensors group_weights(const ArgumentReader& reader) {
    const at::IntArrayRef each = reader.shape("score");
    TORCH_CHECK_VALUE(each.size() == 1, "score must have shape [B], got ", each);
    const int64_t batch = each[0];
    const float* score = reader.data<float>("score", each);
    const int64_t* groups = reader.data<int64_t>("group_ids", each);
    const bool* images = reader.data<bool>("has_visual", each);
    const auto member = [&](int64_t b) { return is_finite(score[b]) && (images == nullptr || images[b]); };
    at::Tensor phi = at::empty(each, reader.tensor("score").options());
    vgpo::group_weights(score, groups, by_group(groups, batch, member), batch, reader.config(),
                        phi.mutable_data_ptr<float>());
    return {phi};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("visual_weights", by_name<visual_weights, Values::kChecked>());
    library.impl("group_weights", by_name<group_weights, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
