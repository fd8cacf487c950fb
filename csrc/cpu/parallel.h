// Work shared by all threads of at::parallel_for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace vgpo {

// Whether this process has run work on several threads. A forked child has none of them, and would wait for them.
inline std::atomic<bool> threads_used{false};

// Calls work(item) for every item in [0, count). Each thread takes the next item when it is done with one, so that
// uneven items and busy cores do not hold up the rest; no result may depend on who takes what.
template <typename Work>
void parallel_items(int64_t count, const Work& work) {
    const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
    if (threads > 1) threads_used.store(true, std::memory_order_relaxed);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t item = next++; item < count; item = next++) work(item);
    });
}

// Pieces of at most `length` that cover some sequences, numbered through.
class Pieces {
public:
    // The lengths of the sequences.
    Pieces(const std::vector<int64_t>& sizes, int64_t length) : length_(length), first_(sizes.size() + 1) {
        for (size_t b = 0; b < sizes.size(); ++b) first_[b + 1] = first_[b] + (sizes[b] + length - 1) / length;
    }

    int64_t count() const { return first_.back(); }
    // The sequence that a piece belongs to, and where the piece begins in it.
    int64_t sequence(int64_t piece) const {
        return std::upper_bound(first_.begin(), first_.end(), piece) - first_.begin() - 1;
    }
    int64_t begin(int64_t piece, int64_t sequence) const { return (piece - first_[sequence]) * length_; }
    int64_t first(int64_t sequence) const { return first_[sequence]; }
    int64_t length() const { return length_; }

private:
    int64_t length_;
    std::vector<int64_t> first_;
};

}  // namespace vgpo
