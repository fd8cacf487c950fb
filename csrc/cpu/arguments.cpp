#include "arguments.h"

#include <ATen/ops/empty.h>

namespace vgpo {

Layout layout_of(const at::Tensor& response_mask, const OptionalTensor& cu_seqlens) {
    if (!cu_seqlens.has_value()) {
        TORCH_CHECK_VALUE(response_mask.dim() == 2, "response_mask must have shape [B, T] without cu_seqlens, got ",
                          response_mask.sizes());
        return Layout::padded(response_mask.size(0), response_mask.size(1), response_mask.size(1));
    }
    TORCH_CHECK_VALUE(response_mask.dim() == 1, "response_mask must have shape [N] with cu_seqlens, got ",
                      response_mask.sizes());
    TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "cu_seqlens must have shape [B + 1], got ",
                      cu_seqlens->sizes());
    const int64_t batch = cu_seqlens->size(0) - 1, tokens = response_mask.size(0);
    const int64_t* boundaries = checked<int64_t>("cu_seqlens", *cu_seqlens, {batch + 1});
    bool rising = boundaries[0] == 0 && boundaries[batch] == tokens;
    for (int64_t b = 0; b < batch; ++b) rising = rising && boundaries[b] <= boundaries[b + 1];
    TORCH_CHECK_VALUE(rising, "cu_seqlens must rise from 0 to ", tokens, " (the packed length) without decreasing");
    return Layout::packed(boundaries, batch, tokens);
}

FocusInput focus_input(const at::Tensor& hidden, const OptionalTensor& visual_mask, Layout& layout,
                       const OptionalTensor& prototype, const OptionalTensor& prototype_index) {
    const bool packed = layout.cu_seqlens != nullptr;
    TORCH_CHECK_VALUE(hidden.device().is_cpu() && hidden.dim() == (packed ? 2 : 3) && hidden.stride(-1) == 1 &&
                          hidden.size(-1) > 0,
                      "hidden must be a CPU tensor of shape ", packed ? "[N, D]" : "[B, S, D]",
                      " with a contiguous last dimension, D > 0, got ", hidden.sizes());
    FocusInput input = {};
    switch (hidden.scalar_type()) {
        case at::kFloat: input.type = HiddenType::kFloat; break;
        case at::kBFloat16: input.type = HiddenType::kBFloat16; break;
        case at::kHalf: input.type = HiddenType::kHalf; break;
        default: TORCH_CHECK_TYPE(false, "hidden must be float32, bfloat16 or float16, got ", hidden.scalar_type());
    }
    if (packed) {
        TORCH_CHECK_VALUE(hidden.size(0) == layout.tokens, "hidden must have ", layout.tokens, " rows, got ",
                          hidden.sizes());
    } else {
        TORCH_CHECK_VALUE(hidden.size(0) == layout.batch && hidden.size(1) >= layout.tokens, "hidden must have shape [",
                          layout.batch, ", S, D] with S >= ", layout.tokens, ", got ", hidden.sizes());
        layout.rows = hidden.size(1);
    }
    input.hidden = hidden.const_data_ptr();
    input.strides = {hidden.stride(0), hidden.stride(packed ? 0 : 1)};
    input.columns = hidden.size(-1);
    input.layout = layout;
    input.visual_mask = checked<bool>("visual_mask", visual_mask, hidden.sizes().slice(0, hidden.dim() - 1));
    TORCH_CHECK_VALUE(visual_mask.has_value() || prototype.has_value(), "visual_mask is None, which needs prototype");
    if (prototype.has_value()) {
        TORCH_CHECK_VALUE(prototype->dim() == 2, "prototype must have shape [P, D], got ", prototype->sizes());
        const int64_t given = prototype_index.has_value() ? prototype->size(0) : layout.batch;
        // Without a row there is no memory to point at, and a null pointer stands for prototypes to be computed.
        TORCH_CHECK_VALUE(given > 0 || layout.batch == 0, "prototype must have a row, got ", prototype->sizes());
        input.prototype = checked<float>("prototype", *prototype, {given, input.columns});
        input.prototype_index = checked<int64_t>("prototype_index", prototype_index, {layout.batch});
        for (int64_t b = 0; input.prototype_index != nullptr && b < layout.batch; ++b) {
            TORCH_CHECK_VALUE(-1 <= input.prototype_index[b] && input.prototype_index[b] < given,
                              "prototype_index must lie in [-1, ", given, "), got ", input.prototype_index[b]);
        }
    }
    return input;
}

namespace {

// Codes become enumerators, and ratios indices: neither may be anything else, NaN included.
void check_code(const char* name, double code, int choices) {
    TORCH_CHECK_VALUE(0.0 <= code && code < choices, name, " must be a code in [0, ", choices, "), got ", code);
}

void check_ratio(const char* name, double ratio) {
    TORCH_CHECK_VALUE(0.0 <= ratio && ratio <= 1.0, name, " must be in [0, 1], got ", ratio);
}

}  // namespace

WeightsConfig config_of(at::ArrayRef<double> fields) {
    TORCH_CHECK_VALUE(fields.size() == kConfigFields, "config must have ", kConfigFields, " numbers, got ",
                      fields.size());
    check_code("schedule", fields[0], 3);
    check_ratio("tail_ratio", fields[2]);
    check_ratio("top_ratio", fields[3]);
    check_code("score", fields[10], 2);
    check_code("position", fields[12], 2);
    check_code("accumulation", fields[13], 3);
    return WeightsConfig::from(fields.data());
}

LossOptions options_of(at::ArrayRef<double> fields) {
    TORCH_CHECK_VALUE(fields.size() == kOptionFields, "options must have ", kOptionFields, " numbers, got ",
                      fields.size());
    check_code("loss_type", fields[0], 8);
    check_code("aggregation", fields[1], 4);
    check_code("kl_estimator", fields[6], 4);
    check_code("importance_mode", fields[15], 2);
    return LossOptions::from(fields.data());
}

namespace {

// A vector of length B is one entry a response, also in a packed batch of as many tokens.
bool is_per_response(const at::Tensor& tensor, const Layout& layout) {
    return tensor.dim() == 1 && tensor.size(0) == layout.batch;
}

}  // namespace

LossInput loss_input(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                     const at::Tensor& response_mask, const Layout& layout, const OptionalTensor& ref_logp,
                     const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                     const OptionalTensor& num_tokens, const OptionalTensor& num_sequences) {
    const at::IntArrayRef shape = response_mask.sizes();
    const at::IntArrayRef one_each(layout.batch);
    LossInput input = {};
    input.layout = layout;
    input.logp = checked<float>("logp", logp, shape);
    input.old_logp = checked<float>("old_logp", old_logp, shape);
    input.advantages_per_response = is_per_response(advantages, layout);
    input.advantages = checked<float>("advantages", advantages, input.advantages_per_response ? one_each : shape);
    input.response_mask = checked<bool>("response_mask", response_mask, shape);
    input.ref_logp = checked<float>("ref_logp", ref_logp, shape);
    input.entropy = checked<float>("entropy", entropy, shape);
    input.importance_per_response = importance_weights.has_value() && is_per_response(*importance_weights, layout);
    input.importance_weights = checked<float>("importance_weights", importance_weights,
                                              input.importance_per_response ? one_each : shape);
    input.num_tokens = checked<float>("num_tokens", num_tokens, {});
    input.num_sequences = checked<float>("num_sequences", num_sequences, {});
    return input;
}

LossTensors empty_loss(const at::Tensor& logp, const OptionalTensor& entropy, int64_t metrics) {
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, logp.options()); };
    return {empty({}), empty(logp.sizes()), entropy.has_value() ? empty(logp.sizes()) : empty({0}), empty({metrics})};
}

LossOutput loss_output(const LossTensors& tensors) {
    const auto& [loss, grad_logp, grad_entropy, metrics] = tensors;
    float* by_entropy = grad_entropy.sizes() == grad_logp.sizes() ? grad_entropy.mutable_data_ptr<float>() : nullptr;
    return {loss.mutable_data_ptr<float>(), grad_logp.mutable_data_ptr<float>(), by_entropy,
            metrics.mutable_data_ptr<float>()};
}

}  // namespace vgpo
