// The largest k of some numbers, exactly: of equal ones those that come first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../math.h"

namespace vgpo {

// Numbers side by side.
struct Run {
    const float* values;
    int64_t length;
};

// Which numbers of a run are among the largest: those whose order key is above `key`, and the first `equal` at it.
struct Cut {
    int32_t key = std::numeric_limits<int32_t>::max();
    int64_t equal = 0;
};

// The cut of each run, so that `wanted` >= 1 numbers of all runs together are chosen. There must be so many, and none
// may be NaN.
inline std::vector<Cut> cuts_of(const std::vector<Run>& runs, int64_t wanted) {
    int64_t number = 0;
    for (const Run& run : runs) number += run.length;
    std::vector<uint32_t> keys(static_cast<size_t>(number));  // order keys plus 2^31, so that they order as unsigned
    uint32_t* next = keys.data();
    for (const Run& run : runs) {
        for (int64_t i = 0; i < run.length; ++i, ++next) {
            *next = 0x80000000u ^ static_cast<uint32_t>(order_key(run.values[i]));
        }
    }
    // From the highest bits down: the bucket in which the last wanted number lies, and of it alone the bits below.
    constexpr int kBits = 11;
    uint32_t found = 0;
    for (const int shift : {21, 10, 0}) {
        const uint32_t buckets = shift == 0 ? 1u << (kBits - 1) : 1u << kBits;
        int64_t counts[1 << kBits] = {};
        for (int64_t i = 0; i < number; ++i) ++counts[keys[i] >> shift & (buckets - 1)];
        uint32_t bucket = buckets - 1;
        for (; counts[bucket] < wanted; --bucket) wanted -= counts[bucket];
        found |= bucket << shift;
        int64_t kept = 0;
        for (int64_t i = 0; i < number; ++i) {
            const uint32_t key = keys[i];
            keys[kept] = key;
            kept += key >> shift == found >> shift;
        }
        number = kept;
    }
    const auto key = static_cast<int32_t>(found ^ 0x80000000u);
    std::vector<Cut> cuts(runs.size(), Cut{key, std::numeric_limits<int64_t>::max()});
    if (wanted == number) return cuts;  // all equal ones are chosen
    for (size_t r = 0; r < runs.size(); ++r) {
        int64_t equal = 0;
        for (int64_t i = 0; i < runs[r].length; ++i) equal += order_key(runs[r].values[i]) == key;
        cuts[r].equal = std::min(equal, wanted);
        wanted -= cuts[r].equal;
    }
    return cuts;
}

// Sets the flags of the chosen ones of a run, and returns how many they are.
inline int64_t choose(const Run& run, const Cut& cut, bool* chosen) {
    int64_t equal = cut.equal, count = 0;
    for (int64_t i = 0; i < run.length; ++i) {
        const int32_t key = order_key(run.values[i]);
        const bool at = key == cut.key;
        chosen[i] = (key > cut.key) | (at & (equal > 0));
        equal -= at;
        count += chosen[i];
    }
    return count;
}

}  // namespace vgpo
