#include "arguments.h"

#include <ATen/ops/empty.h>

#include "settings.h"

namespace vgpo {
namespace {

template <typename Settings>
Settings settings(const char* name, at::ArrayRef<double> numbers) {
    SettingsReader reader(numbers.data(), numbers.size());
    Settings result = {};
    result.read(reader);
    const std::string complaint = reader.complaint(name);
    TORCH_CHECK_VALUE(complaint.empty(), complaint);
    return result;
}

}  // namespace

void ArgumentReader::check_contiguous(const char* name, const at::Tensor& tensor, at::ScalarType type,
                                      at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.scalar_type() == type && tensor.is_contiguous() &&
                          tensor.sizes() == shape,
                      name, " must be a contiguous ", type, " tensor of shape ", shape, " on ", device_, ", got ",
                      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

float* ArgumentReader::rows(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns) const {
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.scalar_type() == at::kFloat && tensor.dim() == 2 &&
                          tensor.size(0) == rows && tensor.size(1) == columns &&
                          (tensor.stride(1) == 1 || columns == 1),
                      name, " must be float32 of shape [", rows, ", ", columns, "] with contiguous rows on ", device_,
                      ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
    return tensor.mutable_data_ptr<float>();
}

HiddenType ArgumentReader::type(const char* name, const at::Tensor& tensor) const {
    switch (tensor.scalar_type()) {
        case at::kFloat: return HiddenType::kFloat;
        case at::kBFloat16: return HiddenType::kBFloat16;
        case at::kHalf: return HiddenType::kHalf;
        default: TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
    }
}

// Boundaries of a packed batch of `length` tokens or rows.
const int64_t* ArgumentReader::boundaries(const char* name, const at::Tensor& cu_seqlens, int64_t length) const {
    TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, name, " must have shape [B + 1], got ",
                      cu_seqlens.sizes());
    const int64_t batch = cu_seqlens.size(0) - 1;
    const int64_t* result = tensor<int64_t>(name, cu_seqlens, {batch + 1});
    if (values_ == Values::kClamped) return result;
    bool rising = result[0] == 0 && result[batch] == length;
    for (int64_t b = 0; b < batch; ++b) rising = rising && result[b] <= result[b + 1];
    TORCH_CHECK_VALUE(rising, name, " must rise from 0 to ", length, " (the packed length) without decreasing");
    return result;
}

Layout ArgumentReader::layout(const at::Tensor& mask, const OptionalTensor& cu_seqlens) const {
    if (!cu_seqlens.has_value()) {
        TORCH_CHECK_VALUE(mask.dim() == 2, "masks must have shape [B, T] without cu_seqlens, got ", mask.sizes());
        return Layout::padded(mask.size(0), mask.size(1), mask.size(1));
    }
    TORCH_CHECK_VALUE(mask.dim() == 1, "masks must have shape [N] with cu_seqlens, got ", mask.sizes());
    const int64_t* data = boundaries("cu_seqlens", *cu_seqlens, mask.size(0));
    return Layout::packed(data, cu_seqlens->size(0) - 1, mask.size(0));
}

FocusTensors ArgumentReader::focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const Layout& layout,
                                 const OptionalTensor& prototype, const OptionalTensor& prototype_index) const {
    const bool packed = layout.cu_seqlens != nullptr;
    TORCH_CHECK_VALUE(hidden.device() == device_ && hidden.dim() == (packed ? 2 : 3) && hidden.stride(-1) == 1 &&
                          hidden.size(-1) > 0,
                      "hidden must have shape ", packed ? "[N, D]" : "[B, S, D]",
                      ", D > 0, with a contiguous last dimension, on ", device_, ", got ", hidden.sizes(), " on ",
                      hidden.device());
    FocusTensors input = {};
    input.layout = layout;
    if (packed) {
        TORCH_CHECK_VALUE(hidden.size(0) == layout.tokens, "hidden must have ", layout.tokens, " rows, got ",
                          hidden.sizes());
    } else {
        TORCH_CHECK_VALUE(hidden.size(0) == layout.batch && hidden.size(1) >= layout.tokens, "hidden must have shape [",
                          layout.batch, ", S, D] with S >= ", layout.tokens, ", got ", hidden.sizes());
        input.layout.rows = hidden.size(1);
    }
    input.hidden = hidden.const_data_ptr();
    input.type = type("hidden", hidden);
    input.strides = {hidden.stride(0), hidden.stride(packed ? 0 : 1)};
    input.columns = hidden.size(-1);
    input.visual_mask = tensor<bool>("visual_mask", visual_mask, hidden.sizes().slice(0, hidden.dim() - 1));
    TORCH_CHECK_VALUE(visual_mask.has_value() || prototype.has_value(), "visual_mask is None, which needs prototype");
    if (!prototype.has_value()) return input;

    TORCH_CHECK_VALUE(prototype->dim() == 2, "prototype must have shape [P, D], got ", prototype->sizes());
    const int64_t given = prototype_index.has_value() ? prototype->size(0) : layout.batch;
    // Without a row there is no memory to point at, and a null pointer stands for prototypes to be computed.
    TORCH_CHECK_VALUE(given > 0 || layout.batch == 0, "prototype must have a row, got ", prototype->sizes());
    input.num_prototypes = given;
    input.prototype = tensor<float>("prototype", *prototype, {given, input.columns});
    input.prototype_index = tensor<int64_t>("prototype_index", prototype_index, {layout.batch});
    if (values_ == Values::kClamped || input.prototype_index == nullptr) return input;
    for (int64_t b = 0; b < layout.batch; ++b) {
        const int64_t row = input.prototype_index[b];
        TORCH_CHECK_VALUE(-1 <= row && row < given, "prototype_index must lie in [-1, ", given, "), got ", row);
    }
    return input;
}

WeightsConfig ArgumentReader::config(at::ArrayRef<double> numbers) const {
    return settings<WeightsConfig>("config", numbers);
}

// A vector of length B has one entry per response, also in a packed batch of as many tokens.
SpreadInput ArgumentReader::spread(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                                   const Layout& layout) const {
    const bool per_response = tensor.dim() == 1 && tensor.size(0) == layout.batch;
    return {this->tensor<float>(name, tensor, per_response ? at::IntArrayRef(layout.batch) : shape), !per_response};
}

LossInput ArgumentReader::loss(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                               const at::Tensor& response_mask, const Layout& layout, const OptionalTensor& ref_logp,
                               const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                               const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                               at::ArrayRef<double> options) const {
    const at::IntArrayRef shape = response_mask.sizes();
    LossInput input = {};
    input.layout = layout;
    input.logp = tensor<float>("logp", logp, shape);
    input.old_logp = tensor<float>("old_logp", old_logp, shape);
    input.advantages = spread("advantages", advantages, shape, layout);
    input.response_mask = tensor<bool>("response_mask", response_mask, shape);
    input.ref_logp = tensor<float>("ref_logp", ref_logp, shape);
    input.entropy = tensor<float>("entropy", entropy, shape);
    if (importance_weights.has_value()) {
        input.importance = spread("importance_weights", *importance_weights, shape, layout);
    }
    input.num_tokens = tensor<float>("num_tokens", num_tokens, {});
    input.num_sequences = tensor<float>("num_sequences", num_sequences, {});
    input.options = settings<LossOptions>("options", options);
    return input;
}

Heads ArgumentReader::heads(const char* name, const at::Tensor& tensor, const char* boundaries_name,
                                 const OptionalTensor& cu_seqlens) const {
    const bool packed = cu_seqlens.has_value();
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.dim() == (packed ? 3 : 4) && tensor.stride(-1) == 1, name,
                      " must have shape ", packed ? "[N, H, d]" : "[B, H, T, d]",
                      " with a contiguous last dimension, on ", device_, ", got ", tensor.sizes(), " on ",
                      tensor.device());
    if (!packed) {
        return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(1),
                tensor.size(2), nullptr};
    }
    return {tensor.const_data_ptr(), 0, tensor.stride(1), tensor.stride(0), tensor.size(1), tensor.size(0),
            boundaries(boundaries_name, *cu_seqlens, tensor.size(0))};
}

AttentionTensors ArgumentReader::attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                                         const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q,
                                         const OptionalTensor& cu_seqlens_k, int64_t num_segments, double scale,
                                         int64_t window) const {
    const bool packed = cu_seqlens_q.has_value();
    TORCH_CHECK_VALUE(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k belong together");
    AttentionTensors input = {};
    input.type = type("q", q);
    input.q = heads("q", q, "cu_seqlens_q", cu_seqlens_q);
    input.k = heads("k", k, "cu_seqlens_k", cu_seqlens_k);
    input.size = q.size(-1);
    input.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
    TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && k.size(-1) == input.size && input.size > 0 &&
                          input.k.heads > 0 && input.q.heads > 0 && input.q.heads % input.k.heads == 0 &&
                          input.batch == (packed ? cu_seqlens_k->size(0) - 1 : k.size(0)),
                      "k must have q's dtype, batch and head size and a divisor of its heads, got ", k.scalar_type(),
                      " ", k.sizes(), " and q ", q.scalar_type(), " ", q.sizes());
    TORCH_CHECK_VALUE(num_segments >= 1 && window >= 0, "num_segments must be positive and window not negative, got ",
                      num_segments, " and ", window);
    input.segments = tensor<int32_t>("key_segments", key_segments, input.token_shape(input.k));
    input.positions = tensor<int64_t>("query_positions", query_positions, input.token_shape(input.q));
    input.num_segments = num_segments;
    input.scale = static_cast<float>(scale);
    input.window = window;
    return input;
}

LossTensors empty_loss(const at::Tensor& logp, const OptionalTensor& entropy, int64_t metrics) {
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, logp.options()); };
    return {empty({}), empty(logp.sizes()), entropy.has_value() ? empty(logp.sizes()) : empty({0}), empty({metrics})};
}

LossOutput loss_output(const LossTensors& tensors, const OptionalTensor& entropy) {
    const auto& [loss, grad_logp, grad_entropy, metrics] = tensors;
    return {loss.mutable_data_ptr<float>(), grad_logp.mutable_data_ptr<float>(),
            entropy.has_value() ? grad_entropy.mutable_data_ptr<float>() : nullptr, metrics.mutable_data_ptr<float>()};
}

}  // namespace vgpo
