// Running statistics of logits, of one view of a token and of two: written once for the CPU and for CUDA.
#pragma once

#include "math.h"

namespace vgpo {

// What logits are measured from. Of minus infinities alone there is nothing to measure from.
VGPO_HD inline float origin_of(float maximum) {
    return maximum == -INFINITY ? 0.0f : maximum;
}

// Of a row of logits z, as head_statistics keeps them.
struct LogitStatistics {
    float maximum = -INFINITY;
    float total = 0.0f;     // of e^(z - maximum)
    float weighted = 0.0f;  // of e^(z - maximum) (z - maximum)

    // Takes in statistics of other logits. Of minus infinities alone there are none.
    VGPO_HD inline void merge(const LogitStatistics& other) {
        const float largest = vgpo::maximum(other.maximum, maximum);
        const LogitStatistics mine = moved_to(largest), theirs = other.moved_to(largest);
        *this = {largest, mine.total + theirs.total, mine.weighted + theirs.weighted};
    }

    // The same, measured from a larger logit.
    VGPO_HD inline LogitStatistics moved_to(float largest) const {
        if (maximum == largest) return *this;
        // Nothing so far, unless a NaN among it has made the total NaN.
        if (maximum == -INFINITY) return {largest, total, total};
        const float drop = maximum - largest, factor = expf(drop);
        return {largest, total * factor, (weighted + total * drop) * factor};
    }
};

// Of the logits of two views, as pair_statistics keeps them: a and b are the logits less their view's maximum.
struct PairStatistics {
    LogitStatistics view[2];
    float distance[2] = {0.0f, 0.0f};  // sums of e^a (a - b) and of e^b (b - a)
    float root = 0.0f;                 // of e^((a + b) / 2)

    VGPO_HD inline void merge(const PairStatistics& other) {
        const float largest = vgpo::maximum(other.view[0].maximum, view[0].maximum);
        const float other_largest = vgpo::maximum(other.view[1].maximum, view[1].maximum);
        const PairStatistics theirs = other.moved_to(largest, other_largest);
        *this = moved_to(largest, other_largest);
        for (int i = 0; i < 2; ++i) {
            view[i].total += theirs.view[i].total;
            view[i].weighted += theirs.view[i].weighted;
            distance[i] += theirs.distance[i];
        }
        root += theirs.root;
    }

    // The same, measured from larger logits.
    VGPO_HD inline PairStatistics moved_to(float largest, float other_largest) const {
        if (view[0].maximum == largest && view[1].maximum == other_largest) return *this;
        PairStatistics moved;
        moved.view[0] = view[0].moved_to(largest);
        moved.view[1] = view[1].moved_to(other_largest);
        const float drops[2] = {origin_of(view[0].maximum) - origin_of(largest),
                                origin_of(view[1].maximum) - origin_of(other_largest)};
        for (int i = 0; i < 2; ++i) {
            // What has no weight any more, or never had any, may be infinitely far apart.
            const bool counts = view[i].total > 0.0f && moved.view[i].total > 0.0f;
            const float change = drops[i] - drops[1 - i];
            moved.distance[i] = counts ? (distance[i] + view[i].total * change) * expf(drops[i]) : 0.0f;
        }
        moved.root = root == 0.0f ? 0.0f : root * expf(0.5f * (drops[0] + drops[1]));
        return moved;
    }
};

// Maximum and log-sum over the vocabulary of both views.
struct PairNormalisers {
    float maximum[2], log_sum[2];
};

// Shares of some logits in sums over the vocabulary, as pair_shares adds them.
struct PairShares {
    float js = 0.0f, tv = 0.0f, js_p = 0.0f, sign_p = 0.0f;
};

// What pair_gradient multiplies with for one view: c0 to c7.
struct ViewGradient {
    float constant, own, difference, cross, root, mixture, sign, at_target;

    VGPO_HD inline bool reads_shares() const { return mixture != 0.0f || sign != 0.0f; }
};

}  // namespace vgpo
