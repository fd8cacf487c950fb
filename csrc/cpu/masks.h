// Compaction of masked sequences, and its reverse.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace vgpo {

// Where a mask is set: `count` entries within [first, first + extent). Usually there are no holes, and arrays can be
// used where they lie.
struct ValidSpan {
    int64_t first = 0, extent = 0, count = 0;

    bool has_holes() const { return count < extent; }
};

inline ValidSpan span_of(const bool* mask, int64_t length) {
    if (length == 0) return {};  // an empty tensor has no data to point to
    const auto* found = static_cast<const bool*>(std::memchr(mask, 1, static_cast<size_t>(length)));
    if (found == nullptr) return {};
    ValidSpan span;
    span.first = found - mask;
    int64_t end = length;
    while (!mask[end - 1]) --end;
    span.extent = end - span.first;
    // Eight entries at a time: each is a byte of 0 or 1, and the product's top byte is their sum.
    int64_t i = span.first;
    for (; i + 8 <= end; i += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, mask + i, sizeof bytes);
        span.count += static_cast<int64_t>((bytes * 0x0101010101010101u) >> 56);
    }
    for (; i < end; ++i) span.count += mask[i];
    return span;
}

// Writes where the mask is set to `positions`, which has room for `length`, and returns how often.
inline int64_t select_positions(const bool* mask, int64_t length, int64_t* positions) {
    const ValidSpan span = span_of(mask, length);
    if (!span.has_holes()) {
        for (int64_t i = 0; i < span.count; ++i) positions[i] = span.first + i;
        return span.count;
    }
    int64_t count = 0;
    for (int64_t i = span.first; i < span.first + span.extent; ++i) {
        positions[count] = i;
        count += mask[i];
    }
    return count;
}

// Moves the values where the mask is set to the front of `to`, which has room for `length`.
inline void compact(const float* from, const bool* mask, int64_t length, float* to) {
    int64_t count = 0;
    for (int64_t i = 0; i < length; ++i) {
        to[count] = from[i];
        count += mask[i];
    }
}

// The reverse, in place: of `length` values, the `count` at the front move to where the mask is set, and `fill` goes
// elsewhere. Selects by bits, because a branch on a mask with holes is mispredicted.
inline void expand(float* values, const bool* mask, int64_t length, int64_t count, float fill) {
    uint32_t filling;
    std::memcpy(&filling, &fill, sizeof filling);
    for (int64_t i = length - 1; i >= 0; --i) {
        count -= mask[i];
        uint32_t value;
        std::memcpy(&value, values + count, sizeof value);
        const uint32_t chosen = 0u - static_cast<uint32_t>(mask[i]);
        value = (value & chosen) | (filling & ~chosen);
        std::memcpy(values + i, &value, sizeof value);
    }
}

// The same for an array of `length` whose span was computed side by side from span.first on.
inline void spread(float* values, const bool* mask, int64_t length, const ValidSpan& span, float fill) {
    std::fill(values, values + span.first, fill);
    if (span.has_holes()) expand(values + span.first, mask + span.first, span.extent, span.count, fill);
    std::fill(values + span.first + span.extent, values + length, fill);
}

// The same for flags, which lie elsewhere: `chosen` has one for each of the span's entries, and room for one more.
inline void spread(const bool* chosen, const bool* mask, int64_t length, const ValidSpan& span, bool* flags) {
    std::fill(flags, flags + span.first, false);
    int64_t count = 0;
    for (int64_t i = span.first; i < span.first + span.extent; ++i) {
        flags[i] = mask[i] & chosen[count];
        count += mask[i];
    }
    std::fill(flags + span.first + span.extent, flags + length, false);
}

}  // namespace vgpo
