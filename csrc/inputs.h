// What operators read and write, as raw pointers: ArgumentReader fills it in, kernels of both devices work on it.
// B responses, N tokens and R rows in all: [B, T] and [B, S] padded, [N] packed, where rows are tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layout.h"
#include "loss_math.h"

namespace vgpo {

struct FocusTensors {
    const void* hidden;  // [R, D], strided
    HiddenType type;
    HiddenStrides strides;
    int64_t columns;  // D
    Layout layout;
    const bool* visual_mask;         // [R]; null with given prototypes
    const float* prototype;          // [P, D], or null: the means of the visual rows
    const int64_t* prototype_index;  // [B] or [N], or null: row b for response b
    bool index_per_token;            // [N]
    int64_t num_prototypes;          // P
    bool causal;                     // a token sees the visual rows before it, not all of its response
    bool unit;                       // rows are averaged as unit vectors, and tokens get the mean of their cosines
};

// A value per response or per token.
struct SpreadInput {
    const float* values;  // [B] or [N], or null
    bool per_token;

    VGPO_HD float at(int64_t response, int64_t token) const { return values[per_token ? token : response]; }
};

struct LossInput {
    Layout layout;
    const float* logp;      // [N]
    const float* old_logp;  // [N]
    SpreadInput advantages;
    const bool* response_mask;  // [N]
    const float* ref_logp;      // [N], or null
    const float* entropy;       // [N], or null
    SpreadInput importance;
    const float* num_tokens;     // [], or null: the valid tokens of this call
    const float* num_sequences;  // [], or null: B
    LossOptions options;
};

struct LossOutput {
    float* loss;          // []
    float* grad_logp;     // [N]
    float* grad_entropy;  // [N], or null
    float* metrics;       // [kPolicyMetrics], and the kFocusMetrics behind them in vgpo_loss

    VGPO_HD void clear(int64_t token) const {
        grad_logp[token] = 0.0f;
        if (grad_entropy != nullptr) grad_entropy[token] = 0.0f;
    }
};

// Queries or keys: [B, H, L, d] padded, [L, H, d] packed with boundaries; strides in elements.
struct Heads {
    const void* data;
    int64_t batch_stride, head_stride, token_stride;
    int64_t heads;
    int64_t length;             // L: per response if padded, of all if packed
    const int64_t* boundaries;  // [B + 1], or null

    int64_t tokens(int64_t b) const { return boundaries == nullptr ? length : boundaries[b + 1] - boundaries[b]; }
    // Index of a response's first token in arrays of one entry per token.
    int64_t first(int64_t b) const { return boundaries == nullptr ? b * length : boundaries[b]; }
    int64_t offset(int64_t b, int64_t head, int64_t token) const {
        const int64_t begin = boundaries == nullptr ? b * batch_stride : boundaries[b] * token_stride;
        return begin + head * head_stride + token * token_stride;
    }
};

struct AttentionTensors {
    HiddenType type;
    Heads q, k;
    int64_t batch, size;       // B, d
    const int32_t* segments;   // one per key
    const int64_t* positions;  // one per query, or null: the last ones
    int64_t num_segments;
    float scale;
    int64_t window;  // 0: none

    bool packed() const { return q.boundaries != nullptr; }
    int64_t group() const { return q.heads / k.heads; }  // query heads that share a key head

    // The shape of one entry per query or key.
    std::vector<int64_t> token_shape(const Heads& tensor) const {
        return packed() ? std::vector<int64_t>{tensor.length} : std::vector<int64_t>{batch, tensor.length};
    }
    // The shape of one entry per query head and query or key.
    std::vector<int64_t> head_shape(const Heads& tensor) const {
        return packed() ? std::vector<int64_t>{q.heads, tensor.length}
                        : std::vector<int64_t>{batch, q.heads, tensor.length};
    }
    // Index into an array of that shape.
    int64_t query_index(int64_t b, int64_t head, int64_t token) const { return head_index(q, b, head) + token; }
    int64_t key_index(int64_t b, int64_t head, int64_t token) const { return head_index(k, b, head) + token; }
    // Negative: sees no key, and how negative makes no difference, so that no arithmetic on it overflows.
    int64_t position(int64_t b, int64_t token) const {
        const int64_t given = positions == nullptr ? k.tokens(b) - q.tokens(b) + token : positions[q.first(b) + token];
        return std::max<int64_t>(given, -1);
    }

private:
    int64_t head_index(const Heads& tensor, int64_t b, int64_t head) const {
        return packed() ? head * tensor.length + tensor.boundaries[b] : (b * q.heads + head) * tensor.length;
    }
};

}  // namespace vgpo
