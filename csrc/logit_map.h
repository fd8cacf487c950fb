// How an LM head's products become logits, and what that does to their gradients: written once for the CPU and CUDA.
// (vgpo_kernels/reference/logits.py defines the same.)
//
// With x a product plus its bias, a logit is bounded(x) * factor. Without a cap bounded(x) is x; with one it is
// tanh(x * squeeze). A gradient w.r.t. x is one w.r.t. the logit times slope_of_cap(bounded(x)), and times what is the
// same for a whole row: the caller's coefficients have that.
#pragma once

#include "math.h"

namespace vgpo {

// 1 - tanh^2, from the tanh.
template <typename F>
VGPO_HD inline F slope_of_cap(F bounded) {
    return F(1.0f) - bounded * bounded;
}

// The row of statistics [4, N] or [5, N] that has the sum of squares, where there is one.
constexpr int64_t kSquaresRow = 4;

// Of one row.
struct LogitMap {
    float factor;
    float squeeze;  // 0: no cap

    VGPO_HD bool capped() const { return squeeze != 0.0f; }
    VGPO_HD float bounded(float x) const { return capped() ? hyperbolic_tangent(x * squeeze) : x; }
    VGPO_HD float logit(float x) const { return bounded(x) * factor; }
};

// Of all rows of a call.
struct LogitMaps {
    LogitMap shared;
    const float* temperatures;  // [N], or null: what each row's factor is divided by

    VGPO_HD bool capped() const { return shared.capped(); }
    VGPO_HD LogitMap of_row(int64_t row) const {
        return {temperatures == nullptr ? shared.factor : shared.factor / temperatures[row], shared.squeeze};
    }

    // Of a scale, a cap (0: none) and a temperature.
    static LogitMaps of(double logit_scale, double softcap, double temperature, const float* temperatures) {
        const bool capped = softcap != 0.0;
        return {{static_cast<float>((capped ? softcap : logit_scale) / temperature),
                 static_cast<float>(capped ? logit_scale / softcap : 0.0)},
                temperatures};
    }
};

}  // namespace vgpo
