#include "attention_keys.h"

#include "arguments.h"

namespace vgpo {
namespace {

HiddenType head_type(const at::Tensor& q) {
    switch (q.scalar_type()) {
        case at::kFloat: return HiddenType::kFloat;
        case at::kBFloat16: return HiddenType::kBFloat16;
        case at::kHalf: return HiddenType::kHalf;
        default: TORCH_CHECK_TYPE(false, "q must be float32, bfloat16 or float16, got ", q.scalar_type());
    }
}

HeadTensor head_tensor(const char* name, const at::Tensor& tensor, const OptionalTensor& cu_seqlens) {
    const bool packed = cu_seqlens.has_value();
    TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.dim() == (packed ? 3 : 4) && tensor.stride(-1) == 1, name,
                      " must be a CPU tensor of shape ", packed ? "[N, H, d]" : "[B, H, T, d]",
                      " with a contiguous last dimension, got ", tensor.sizes());
    if (!packed) {
        return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(1),
                tensor.size(2), nullptr};
    }
    TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "cu_seqlens must have shape [B + 1], got ",
                      cu_seqlens->sizes());
    const int64_t batch = cu_seqlens->size(0) - 1;
    const int64_t* boundaries = checked<int64_t>("cu_seqlens", *cu_seqlens, {batch + 1});
    bool rising = boundaries[0] == 0 && boundaries[batch] == tensor.size(0);
    for (int64_t b = 0; b < batch; ++b) rising = rising && boundaries[b] <= boundaries[b + 1];
    TORCH_CHECK_VALUE(rising, "cu_seqlens of ", name, " must rise from 0 to ", tensor.size(0), " without decreasing");
    return {tensor.const_data_ptr(), 0, tensor.stride(1), tensor.stride(0), tensor.size(1), tensor.size(0), boundaries};
}

}  // namespace

AttentionInput attention_input(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                               const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, int64_t num_segments, double scale,
                               int64_t window) {
    AttentionInput input = {};
    TORCH_CHECK_VALUE(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                      "cu_seqlens_q and cu_seqlens_k belong together");
    input.type = head_type(q);
    input.q = head_tensor("q", q, cu_seqlens_q);
    input.k = head_tensor("k", k, cu_seqlens_k);
    input.size = q.size(-1);
    const bool packed = cu_seqlens_q.has_value();
    input.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
    TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && k.size(-1) == input.size && input.size > 0 &&
                          input.k.heads > 0 && input.q.heads > 0 && input.q.heads % input.k.heads == 0 &&
                          input.batch == (packed ? cu_seqlens_k->size(0) - 1 : k.size(0)),
                      "k must have q's dtype, batch and head size and a divisor of its heads, got ", k.scalar_type(), " ",
                      k.sizes(), " and q ", q.scalar_type(), " ", q.sizes());
    const auto tokens_of = [&](const HeadTensor& tensor) {
        return packed ? std::vector<int64_t>{tensor.length} : std::vector<int64_t>{input.batch, tensor.length};
    };
    input.segments = checked<int32_t>("key_segments", key_segments, tokens_of(input.k));
    input.positions = checked<int64_t>("query_positions", query_positions, tokens_of(input.q));
    TORCH_CHECK_VALUE(num_segments >= 1 && window >= 0, "num_segments must be positive and window not negative");
    input.num_segments = num_segments;
    input.scale = static_cast<float>(scale);
    input.window = window;
    return input;
}

KeyOrder::KeyOrder(const AttentionInput& input, int64_t b) {
    const int32_t* segments = input.segments + input.k.first(b);
    const int64_t tokens = input.k.tokens(b);
    const auto counts = [&](int64_t key) { return segments[key] >= 0 && segments[key] < input.num_segments; };
    std::vector<int64_t> ends(input.num_segments);
    for (int64_t key = 0; key < tokens; ++key) {
        if (counts(key)) ++ends[segments[key]];
    }
    int64_t begin = 0;
    for (int64_t segment = 0; segment < input.num_segments; ++segment) {
        const int64_t end = begin + ends[segment];
        if (begin < end) segments_.push_back({segment, begin, end});
        ends[segment] = begin;
        begin = end;
    }
    keys_.resize(begin);
    for (int64_t key = 0; key < tokens; ++key) {
        if (counts(key)) keys_[ends[segments[key]]++] = key;
    }
}

}  // namespace vgpo
