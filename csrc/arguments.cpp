#include "arguments.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "settings.h"

namespace vgpo {

ArgumentReader::ArgumentReader(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments, Values values)
    : schema_(schema), arguments_(arguments), device_(at::kCPU), values_(values) {
    const auto is_tensor = [](const c10::IValue& value) { return value.isTensor(); };
    const auto first = std::find_if(arguments.begin(), arguments.end(), is_tensor);
    TORCH_CHECK_VALUE(first != arguments.end(), schema.name(), " needs a tensor");
    device_ = first->toTensor().device();
}

const c10::IValue& ArgumentReader::argument(const char* name) const {
    const std::optional<int> index = schema_.argumentIndexWithName(name);
    TORCH_CHECK(index.has_value(), schema_.name(), " has no argument ", name);
    read_ |= uint64_t{1} << *index;
    return arguments_[*index];
}

void ArgumentReader::check_all_read() const {
    const size_t count = arguments_.size();
    if (read_ == (uint64_t{1} << count) - 1) return;
    for (size_t i = 0; i < count; ++i) {
        const bool read = (read_ >> i & 1) != 0;
        TORCH_CHECK(read, schema_.name(), " does not read its argument ", schema_.arguments()[i].name());
    }
}

void ArgumentReader::check_contiguous(const char* name, const at::Tensor& tensor, at::ScalarType type,
                                      at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.scalar_type() == type && tensor.is_contiguous() &&
                          tensor.sizes() == shape,
                      name, " must be a contiguous ", type, " tensor of shape ", shape, " on ", device_, ", got ",
                      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

float* ArgumentReader::rows(const char* name, int64_t rows, int64_t columns) const {
    const at::Tensor& tensor = this->tensor(name);
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.scalar_type() == at::kFloat && tensor.dim() == 2 &&
                          tensor.size(0) == rows && tensor.size(1) == columns &&
                          (tensor.stride(1) == 1 || columns == 1),
                      name, " must be float32 of shape [", rows, ", ", columns, "] with contiguous rows on ", device_,
                      ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
    return tensor.mutable_data_ptr<float>();
}

float* ArgumentReader::written_rows(const char* name, int64_t rows, int64_t columns) const {
    float* const data = this->rows(name, rows, columns);
    const at::Tensor& tensor = this->tensor(name);
    TORCH_CHECK_VALUE(rows <= 1 || tensor.stride(0) >= columns, name,
                      " is written to, so its rows must be contiguous and apart, got strides ", tensor.strides(),
                      " of ", tensor.scalar_type(), " ", tensor.sizes());
    return data;
}

HiddenType ArgumentReader::type(const char* name) const {
    switch (tensor(name).scalar_type()) {
        case at::kFloat: return HiddenType::kFloat;
        case at::kBFloat16: return HiddenType::kBFloat16;
        case at::kHalf: return HiddenType::kHalf;
        default:
            TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", tensor(name).scalar_type());
    }
}

// Boundaries of a packed batch of `length` tokens or rows.
const int64_t* ArgumentReader::boundaries(const char* name, int64_t length) const {
    const at::IntArrayRef given = shape(name);
    TORCH_CHECK_VALUE(given.size() == 1 && given[0] >= 1, name, " must have shape [B + 1], got ", given);
    const int64_t batch = given[0] - 1;
    const int64_t* result = data<int64_t>(name, given);
    if (values_ == Values::kClamped) return result;
    bool rising = result[0] == 0 && result[batch] == length;
    for (int64_t b = 0; b < batch; ++b) rising = rising && result[b] <= result[b + 1];
    TORCH_CHECK_VALUE(rising, name, " must rise from 0 to ", length, " (the packed length) without decreasing");
    return result;
}

Layout ArgumentReader::layout(const char* mask) const {
    const at::IntArrayRef given = shape(mask);
    if (!has("cu_seqlens")) {
        TORCH_CHECK_VALUE(given.size() == 2, "masks must have shape [B, T] without cu_seqlens, got ", given);
        return Layout::padded(given[0], given[1], given[1]);
    }
    TORCH_CHECK_VALUE(given.size() == 1, "masks must have shape [N] with cu_seqlens, got ", given);
    const int64_t* cu_seqlens = boundaries("cu_seqlens", given[0]);
    return Layout::packed(cu_seqlens, shape("cu_seqlens")[0] - 1, given[0]);
}

FocusTensors ArgumentReader::hidden(const Layout& layout) const {
    const at::Tensor& hidden = tensor("hidden");
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
    input.type = type("hidden");
    input.strides = {hidden.stride(0), hidden.stride(packed ? 0 : 1)};
    input.columns = hidden.size(-1);
    input.visual_mask = data<bool>("visual_mask", hidden.sizes().slice(0, hidden.dim() - 1));
    return input;
}

FocusTensors ArgumentReader::focus(const Layout& layout) const {
    FocusTensors input = hidden(layout);
    input.causal = value<bool>("causal");
    const bool indexed = has("prototype_index");
    if (!has("prototype")) {
        TORCH_CHECK_VALUE(has("visual_mask"), "visual_mask is None, which needs prototype");
        return input;
    }
    const at::IntArrayRef prototypes = shape("prototype");
    TORCH_CHECK_VALUE(prototypes.size() == 2, "prototype must have shape [P, D], got ", prototypes);
    const int64_t given = indexed ? prototypes[0] : layout.batch;
    // Without a row there is no memory to point at, and a null pointer stands for prototypes to be computed.
    TORCH_CHECK_VALUE(given > 0 || layout.batch == 0, "prototype must have a row, got ", prototypes);
    input.num_prototypes = given;
    input.prototype = data<float>("prototype", {given, input.columns});
    if (!indexed) return input;
    input.index_per_token = shape("prototype_index") != at::IntArrayRef(layout.batch);
    const at::IntArrayRef index_shape = input.index_per_token ? shape("response_mask") : at::IntArrayRef(layout.batch);
    input.prototype_index = data<int64_t>("prototype_index", index_shape);
    if (values_ == Values::kClamped) return input;
    for (int64_t i = 0; i < tensor("prototype_index").numel(); ++i) {
        const int64_t row = input.prototype_index[i];
        TORCH_CHECK_VALUE(-1 <= row && row < given, "prototype_index must lie in [-1, ", given, "), got ", row);
    }
    return input;
}

template <typename Settings>
Settings ArgumentReader::settings(const char* name) const {
    const std::vector<double> numbers = argument(name).toDoubleVector();
    SettingsReader reader(numbers.data(), numbers.size());
    Settings result = {};
    result.read(reader);
    const std::string complaint = reader.complaint(name);
    TORCH_CHECK_VALUE(complaint.empty(), complaint);
    return result;
}

WeightsConfig ArgumentReader::config() const { return settings<WeightsConfig>("config"); }

ShapingConfig ArgumentReader::shaping() const { return settings<ShapingConfig>("config"); }

// A vector of length B has one entry per response, also in a packed batch of as many tokens.
SpreadInput ArgumentReader::spread(const char* name, at::IntArrayRef shape, const Layout& layout) const {
    if (!has(name)) return {};
    const bool per_response = this->shape(name) == at::IntArrayRef(layout.batch);
    return {data<float>(name, per_response ? at::IntArrayRef(layout.batch) : shape), !per_response};
}

LogitMaps ArgumentReader::logit_maps(int64_t rows) const {
    return LogitMaps::of(value<double>("logit_scale"), value<double>("softcap"), value<double>("temperature"),
                         data<float>("temperatures", {rows}));
}

LossInput ArgumentReader::loss(const Layout& layout) const {
    const at::IntArrayRef tokens = shape("response_mask");
    LossInput input = {};
    input.layout = layout;
    input.logp = data<float>("logp", tokens);
    input.old_logp = data<float>("old_logp", tokens);
    input.advantages = spread("advantages", tokens, layout);
    input.response_mask = data<bool>("response_mask", tokens);
    input.ref_logp = data<float>("ref_logp", tokens);
    input.entropy = data<float>("entropy", tokens);
    input.importance = spread("importance_weights", tokens, layout);
    input.num_tokens = data<float>("num_tokens", {});
    input.num_sequences = data<float>("num_sequences", {});
    input.options = settings<LossOptions>("options");
    return input;
}

// To be called after `loss`, which has checked logp. The gradient w.r.t. entropy has no elements without entropy.
LossResult ArgumentReader::empty_loss(int64_t metrics) const {
    const at::Tensor& logp = tensor("logp");
    const bool bonus = has("entropy");
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, logp.options()); };
    const at::Tensor loss = empty({}), grad_logp = empty(logp.sizes());
    const at::Tensor grad_entropy = bonus ? empty(logp.sizes()) : empty({0}), values = empty({metrics});
    return {{loss, grad_logp, grad_entropy, values},
            {loss.mutable_data_ptr<float>(), grad_logp.mutable_data_ptr<float>(),
             bonus ? grad_entropy.mutable_data_ptr<float>() : nullptr, values.mutable_data_ptr<float>()}};
}

Heads ArgumentReader::heads(const char* name, const char* boundaries_name) const {
    const at::Tensor& tensor = this->tensor(name);
    const bool packed = has(boundaries_name);
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.dim() == (packed ? 3 : 4) && tensor.stride(-1) == 1, name,
                      " must have shape ", packed ? "[N, H, d]" : "[B, H, T, d]",
                      " with a contiguous last dimension, on ", device_, ", got ", tensor.sizes(), " on ",
                      tensor.device());
    if (!packed) {
        return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(1),
                tensor.size(2), nullptr};
    }
    return {tensor.const_data_ptr(), 0, tensor.stride(1), tensor.stride(0), tensor.size(1), tensor.size(0),
            boundaries(boundaries_name, tensor.size(0))};
}

AttentionTensors ArgumentReader::attention(int64_t num_segments) const {
    const at::Tensor &q = tensor("q"), &k = tensor("k");
    const bool packed = has("cu_seqlens_q");
    TORCH_CHECK_VALUE(packed == has("cu_seqlens_k"), "cu_seqlens_q and cu_seqlens_k belong together");
    AttentionTensors input = {};
    input.type = type("q");
    input.q = heads("q", "cu_seqlens_q");
    input.k = heads("k", "cu_seqlens_k");
    input.size = q.size(-1);
    input.batch = packed ? shape("cu_seqlens_q")[0] - 1 : q.size(0);
    TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && k.size(-1) == input.size && input.size > 0 &&
                          input.k.heads > 0 && input.q.heads > 0 && input.q.heads % input.k.heads == 0 &&
                          input.batch == (packed ? shape("cu_seqlens_k")[0] - 1 : k.size(0)),
                      "k must have q's dtype, batch and head size and a divisor of its heads, got ", k.scalar_type(),
                      " ", k.sizes(), " and q ", q.scalar_type(), " ", q.sizes());
    input.window = value<int64_t>("window");
    TORCH_CHECK_VALUE(num_segments >= 1 && num_segments <= kMostSegments && input.window >= 0,
                      "num_segments must be in 1..", kMostSegments, " and window not negative, got ", num_segments,
                      " and ", input.window);
    const auto scale = value<double>("scale");
    TORCH_CHECK_VALUE(std::abs(scale) <= kLargestScale, "scale must be finite and within +-2**127, got ", scale);
    input.segments = data<int32_t>("key_segments", input.token_shape(input.k));
    input.positions = data<int64_t>("query_positions", input.token_shape(input.q));
    input.num_segments = num_segments;
    input.scale = static_cast<float>(scale);
    return input;
}

void call(Operation operation, Values values, const c10::FunctionSchema& schema, torch::jit::Stack& stack) {
    const size_t count = schema.arguments().size();
    const ArgumentReader reader(schema, torch::jit::last(stack, count), values);
    Tensors results = operation(reader);
    reader.check_all_read();
    TORCH_CHECK(results.size() == schema.returns().size(), schema.name(), " returns ", results.size(), " tensors");
    torch::jit::drop(stack, count);
    for (at::Tensor& result : results) stack.emplace_back(std::move(result));
}

}  // namespace vgpo
