#include "attention_keys.h"

namespace vgpo {
KeyOrder::KeyOrder(const AttentionTensors& input, int64_t b) {
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
