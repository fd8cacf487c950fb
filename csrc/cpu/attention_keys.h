// The keys of a response in the order in which kernels visit them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../inputs.h"

namespace vgpo {

// A run of keys in visiting order, all of one segment.
struct Run {
    int64_t segment, begin, end;
};

// The keys of a response ordered by segment, ignored ones left out: a sum over a segment is then a sum over
// neighbours, however many segments there are, and what a query sees of a run is one range of it.
class KeyOrder {
public:
    KeyOrder(const AttentionTensors& input, int64_t b);

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
