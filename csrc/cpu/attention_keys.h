// Queries and keys of attention ops in both layouts, and the keys of a response in the order kernels visit them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace vgpo {

// Queries or keys: [B, H, L, d] padded, [L, H, d] packed with boundaries; strides in elements.
struct HeadTensor {
    const void* data;
    int64_t batch_stride, head_stride, token_stride;
    int64_t heads;
    int64_t length;             // L: of each response if padded, of all if packed
    const int64_t* boundaries;  // [B + 1], or null

    int64_t tokens(int64_t b) const { return boundaries == nullptr ? length : boundaries[b + 1] - boundaries[b]; }
    // Index of a response's first token in arrays of one entry a token.
    int64_t first(int64_t b) const { return boundaries == nullptr ? b * length : boundaries[b]; }
    int64_t offset(int64_t b, int64_t head, int64_t token) const {
        const int64_t begin = boundaries == nullptr ? b * batch_stride : boundaries[b] * token_stride;
        return begin + head * head_stride + token * token_stride;
    }
};

struct AttentionInput {
    HiddenType type;
    HeadTensor q, k;
    int64_t batch, size;        // B, d
    const int32_t* segments;    // one a key
    const int64_t* positions;   // one a query, or null: the last ones
    int64_t num_segments;
    float scale;
    int64_t window;  // 0: none

    int64_t group() const { return q.heads / k.heads; }  // query heads that share a key head
    // Index of a query or a key in arrays of one entry a query head and token: [B, Hq, L] padded, [Hq, L] packed.
    int64_t query_index(int64_t b, int64_t head, int64_t token) const { return by_head(q, b, head) + token; }
    int64_t key_index(int64_t b, int64_t head, int64_t token) const { return by_head(k, b, head) + token; }
    // Negative: sees no key, and how negative makes no difference, so that no arithmetic on it overflows.
    int64_t position(int64_t b, int64_t token) const {
        const int64_t given = positions == nullptr ? k.tokens(b) - q.tokens(b) + token : positions[q.first(b) + token];
        return std::max<int64_t>(given, -1);
    }

private:
    int64_t by_head(const HeadTensor& tensor, int64_t b, int64_t head) const {
        return tensor.boundaries == nullptr ? (b * q.heads + head) * tensor.length
                                            : head * tensor.length + tensor.boundaries[b];
    }
};

// Checks the tensors of an op against each other.
AttentionInput attention_input(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                               const std::optional<at::Tensor>& query_positions,
                               const std::optional<at::Tensor>& cu_seqlens_q,
                               const std::optional<at::Tensor>& cu_seqlens_k, int64_t num_segments, double scale,
                               int64_t window);

// A run of keys in visiting order, all of one segment.
struct Run {
    int64_t segment, begin, end;
};

// What attention_heatmap calls its keys.
constexpr int64_t kLabels = 2, kShown = 1;

// The keys of a response ordered by segment, ignored ones left out: a sum over a segment is then a sum over
// neighbours, however many segments there are, and what a query sees of a run is one range of it.
class KeyOrder {
public:
    KeyOrder(const AttentionInput& input, int64_t b);

    int64_t count() const { return static_cast<int64_t>(keys_.size()); }
    const std::vector<int64_t>& keys() const { return keys_; }
    const std::vector<Run>& segments() const { return segments_; }

    // The part [begin, end) of a run that a query at `position` sees.
    struct Range {
        int64_t begin, end;
        bool empty() const { return begin >= end; }
    };
    Range visible(const Run& run, int64_t position, int64_t window) const {
        const auto first = keys_.begin() + run.begin, last = keys_.begin() + run.end;
        const int64_t oldest = window == 0 ? 0 : position - window + 1;
        if (*first >= oldest && *(last - 1) <= position) return {run.begin, run.end};
        const auto begin = std::lower_bound(first, last, oldest), end = std::upper_bound(first, last, position);
        return {begin - keys_.begin(), end - keys_.begin()};
    }

private:
    std::vector<int64_t> keys_;  // index in the response, which is the key's position
    std::vector<Run> segments_;  // without empty ones
};

}  // namespace vgpo
