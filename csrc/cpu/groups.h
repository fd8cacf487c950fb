// Responses group by group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vgpo {

// The responses that member(response) says are in their groups, group by group, in the batch's order within each.
// Without ids all are one group.
template <typename Member>
std::vector<int64_t> by_group(const int64_t* group_ids, int64_t batch, const Member& member) {
    std::vector<int64_t> order;
    for (int64_t b = 0; b < batch; ++b) {
        if (member(b)) order.push_back(b);
    }
    if (group_ids == nullptr) return order;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group_ids[a] < group_ids[b]; });
    return order;
}

// Calls visit(begin, end) for each group's share of that order.
template <typename Visit>
void for_each_group(const std::vector<int64_t>& order, const int64_t* group_ids, const Visit& visit) {
    for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
        while (end < order.size() && (group_ids == nullptr || group_ids[order[end]] == group_ids[order[begin]])) ++end;
        visit(begin, end);
    }
}

}  // namespace vgpo
