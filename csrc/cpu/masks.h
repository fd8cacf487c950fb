// Compaction of masked sequences, and its reverse.
#pragma once

#include <cstdint>
#include <cstring>

namespace vgpo {

inline int64_t count_set(const bool* mask, int64_t length) {
    int64_t count = 0;
    for (int64_t i = 0; i < length; ++i) count += mask[i];
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

// The reverse, in place: the values at the front move to where the mask is set, `fill` goes elsewhere.
inline void expand(float* values, const bool* mask, int64_t length, int64_t count, float fill) {
    if (count == length) return;
    for (int64_t i = length - 1; i >= 0; --i) {
        count -= mask[i];
        values[i] = mask[i] ? values[count] : fill;
    }
}

}  // namespace vgpo
