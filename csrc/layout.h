// Where the rows and tokens of a response lie: padded and packed batches are one code path on host and device.
#pragma once

#include <cstdint>

#include "math.h"

namespace vgpo {

// Tokens index response arrays ([B, T] padded, [N] packed), rows index `hidden` and `visual_mask` ([B, S] padded,
// [N] packed); both are flat, 64-bit and contiguous. A padded token (b, t) is row (b, S - T + t); a packed token n
// is row n.
struct Layout {
    const int64_t* cu_seqlens;  // [B + 1], or null for a padded batch
    int64_t batch;              // B
    int64_t tokens;             // T of a padded batch, N of a packed one
    int64_t rows;               // S of a padded batch, N of a packed one

    static Layout padded(int64_t batch, int64_t tokens, int64_t rows) { return {nullptr, batch, tokens, rows}; }
    static Layout packed(const int64_t* cu_seqlens, int64_t batch, int64_t tokens) {
        return {cu_seqlens, batch, tokens, tokens};
    }

    // Boundaries are clamped into the arrays: a device kernel cannot raise on bad values, and must not read outside.
    VGPO_HD int64_t boundary(int64_t index) const {
        const int64_t value = cu_seqlens[index];
        return value < 0 ? 0 : (value > tokens ? tokens : value);
    }

    VGPO_HD int64_t token_begin(int64_t response) const {
        return cu_seqlens == nullptr ? response * tokens : boundary(response);
    }
    VGPO_HD int64_t token_end(int64_t response) const {
        return cu_seqlens == nullptr ? (response + 1) * tokens : boundary(response + 1);
    }
    VGPO_HD int64_t row_begin(int64_t response) const {
        return cu_seqlens == nullptr ? response * rows : boundary(response);
    }
    VGPO_HD int64_t row_end(int64_t response) const {
        return cu_seqlens == nullptr ? (response + 1) * rows : boundary(response + 1);
    }
    // The row of a token of `response`.
    VGPO_HD int64_t row_of(int64_t response, int64_t token) const {
        return cu_seqlens == nullptr ? token + (response + 1) * (rows - tokens) : token;
    }

    VGPO_HD int64_t num_tokens() const { return cu_seqlens == nullptr ? batch * tokens : tokens; }
    VGPO_HD int64_t num_rows() const { return cu_seqlens == nullptr ? batch * rows : rows; }
};

// What attention computes with: a GPU starts no more blocks than 65,535 along the dimension of segments, each of which
// sums up eight; and kernels multiply the scale by log2(e) in float.
constexpr int64_t kMostSegments = 65535 * 8;
constexpr double kLargestScale = 0x1p127;

// How attention_heatmap labels its keys: shown, or another.
constexpr int kLabels = 2, kShown = 1;

// Element types of hidden states, and of queries and keys.
enum class HiddenType { kFloat, kBFloat16, kHalf };
constexpr int kHiddenTypes = 3;

// `hidden` keeps its own strides, in elements; the last dimension is contiguous.
struct HiddenStrides {
    int64_t batch;  // of [B, S, D]; unused for [N, D]
    int64_t row;

    // Offset of a row of `response`, 64-bit because N * D passes 2^31 on real batches.
    VGPO_HD int64_t offset(const Layout& layout, int64_t response, int64_t row_index) const {
        if (layout.cu_seqlens != nullptr) return row_index * row;
        return response * batch + (row_index - response * layout.rows) * row;
    }
};

}  // namespace vgpo
