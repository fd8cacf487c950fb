// Functions of a vector, written once over the interface of vector_avx512.h. Include after the vector type, inside
// its namespace.

// The scalar overloads beside those of vectors, which would hide them.
using vgpo::maximum;
using vgpo::minimum;

// e^x to about one unit in the last place. Infinite above 88.7, zero below -104; NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector bounded = minimum(maximum(x, Vector(-110.0f)), Vector(110.0f));
    const Vector n = rounded(bounded * Vector(1.44269504f));
    // ln 2 in two parts; the first has so few bits that its product with n is exact.
    Vector r = multiply_add(n, Vector(-0.693359375f), bounded);
    r = multiply_add(n, Vector(2.12194440e-4f), r);
    // The Taylor coefficients of e^r, |r| <= ln(2) / 2, to r^7: truncation below 6e-9.
    Vector p(1.0f / 5040.0f);
    p = multiply_add(p, r, Vector(1.0f / 720.0f));
    p = multiply_add(p, r, Vector(1.0f / 120.0f));
    p = multiply_add(p, r, Vector(1.0f / 24.0f));
    p = multiply_add(p, r, Vector(1.0f / 6.0f));
    p = multiply_add(p, r, Vector(0.5f));
    p = multiply_add(p, r, Vector(1.0f));
    p = multiply_add(p, r, Vector(1.0f));
    return scaled_by_power_of_two(p, n);
}

// Natural logarithm of a normal number above zero, to two units in the last place, also near one.
inline Vector logarithm(Vector x) {
    const Parts parts = parts_of(x);
    // The mantissa in [sqrt(1/2), sqrt(2)), so that the exponent of a number near one is zero.
    const Mask high = parts.mantissa > Vector(1.41421356f);
    const Vector m = select(high, parts.mantissa * Vector(0.5f), parts.mantissa);
    const Vector e = select(high, parts.exponent + Vector(1.0f), parts.exponent);
    // log m = 2 artanh r, |r| <= 0.1716: truncation below 1e-8.
    const Vector above = m - Vector(1.0f), r = above / (m + Vector(1.0f)), square = r * r;
    Vector p(2.0f / 9.0f);
    p = multiply_add(p, square, Vector(2.0f / 7.0f));
    p = multiply_add(p, square, Vector(2.0f / 5.0f));
    p = multiply_add(p, square, Vector(2.0f / 3.0f));
    const Vector of_mantissa = multiply_add(p * square, r, r + r);
    return multiply_add(e, Vector(0.693147181f), of_mantissa);
}

// tanh to two units in the last place, also of small numbers; NaN stays NaN.
inline Vector hyperbolic_tangent(Vector x) {
    // Odd polynomial for |x| < 0.625 (Cephes), where the form with exponentials would cancel.
    const Vector square = x * x;
    Vector p(-5.70498872745e-3f);
    p = multiply_add(p, square, Vector(2.06390887954e-2f));
    p = multiply_add(p, square, Vector(-5.37397155531e-2f));
    p = multiply_add(p, square, Vector(1.33314422036e-1f));
    p = multiply_add(p, square, Vector(-3.33332819422e-1f));
    const Vector small = multiply_add(p * square, x, x);
    // 1 - 2 / (e^2|x| + 1), which is 1 where the exponential is infinite. The sign is put back last.
    const Vector magnitude = maximum(x, Vector(0.0f) - x);
    const Vector large = Vector(1.0f) - Vector(2.0f) / (exponential(magnitude + magnitude) + Vector(1.0f));
    const Vector with_sign = select(x < Vector(0.0f), Vector(0.0f) - large, large);
    return select(magnitude >= Vector(0.625f), with_sign, small);
}

// Lane by lane: only an exponential schedule with an exponent other than 2 comes here.
inline Vector power(Vector base, float exponent) {
    float lanes[Vector::kWidth];
    store(lanes, base);
    for (float& lane : lanes) lane = powf(lane, exponent);
    return load(lanes);
}

// log(1 + x) of a finite x >= 0 to a few units in the last place. The quotient makes up for what the sum rounds off.
inline Vector log_one_plus(Vector x) {
    const Vector one(1.0f), sum = one + x, above = sum - one;
    const Mask small = above == Vector(0.0f);
    return select(small, x, logarithm(sum) * (x / select(small, one, above)));
}

// Of a base in [0, 1] that is 0 or a normal number; 0 to the power of 0 is 1.
inline Vector power_of_unit(Vector base, float exponent) {
    if (exponent == 0.0f) return Vector(1.0f);
    const Vector power = exponential(Vector(exponent) * logarithm(maximum(base, Vector(1e-30f))));
    return select(base > Vector(0.0f), power, Vector(0.0f));
}

// first, first + 1, ... exact below 2^24.
inline Vector ordinals_from(float first) {
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return Vector(first) + load(lanes);
}

inline Mask is_finite(Vector v) { return v - v == Vector(0.0f); }  // no product is fused here, see setup.py

// How many of the vector's lanes, beginning at `index`, lie before `end`.
inline int lanes_of(int64_t index, int64_t end) {
    return end - index < Vector::kWidth ? static_cast<int>(end - index) : Vector::kWidth;
}

// Tokens whose fp32 lane sums are folded into a double: enough to be free, few enough to keep the error small.
constexpr int64_t kSumBlock = 1024;
