// Four floats in a NEON register: the interface of vector_avx512.h for 64-bit ARM. Sums, minima and maxima follow
// vector_portable.h to the bit; products are fused, as with AVX2. Include inside `namespace vgpo::neon`, after
// <arm_neon.h>.

constexpr int kRegisters = 32;
// Rows read side by side; as many as fit the registers when each needs two sums. Four units with a latency of four
// cycles want sixteen sums at once.
constexpr int kStreams = 8;

struct Mask {
    uint32x4_t bits;  // all ones or all zeros per lane
};

inline Mask operator&(Mask a, Mask b) { return {vandq_u32(a.bits, b.bits)}; }
inline Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.bits, b.bits)}; }
inline Mask operator!(Mask a) { return {vmvnq_u32(a.bits)}; }
inline int count(Mask mask) { return -vaddvq_s32(vreinterpretq_s32_u32(mask.bits)); }
inline bool any(Mask mask) { return vmaxvq_u32(mask.bits) != 0; }
inline Mask first_lanes(int lanes) {
    static const int32_t ordinals[4] = {0, 1, 2, 3};
    return {vcgtq_s32(vdupq_n_s32(lanes), vld1q_s32(ordinals))};
}

struct Vector {
    static constexpr int kWidth = 4;
    float32x4_t value;

    Vector() = default;
    explicit Vector(float scalar) : value(vdupq_n_f32(scalar)) {}
    explicit Vector(float32x4_t register_value) : value(register_value) {}
};

template <typename T>
inline Vector widened(uint16x4_t bits);
template <>
inline Vector widened<BFloat16>(uint16x4_t bits) {
    return Vector(vreinterpretq_f32_u32(vshll_n_u16(bits, 16)));
}
template <>
inline Vector widened<Half>(uint16x4_t bits) {
    return Vector(vcvt_f32_f16(vreinterpret_f16_u16(bits)));
}

inline Vector load(const float* from) { return Vector(vld1q_f32(from)); }
template <typename T>
inline Vector load(const T* from) {
    return widened<T>(vld1_u16(&from->bits));
}

struct Pair {
    Vector first, second;
};

inline Pair load_pair(const BFloat16* from) {
    const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(&from->bits));
    return {Vector(vreinterpretq_f32_u32(vshlq_n_u32(bits, 16))),
            Vector(vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000u))))};
}

// The first `lanes` elements, zeros behind them; memory behind them is not touched. Lane by lane: of a loop over a copy
// the compiler makes a call of memcpy, and sums then leave their registers.
inline Vector load_first(const float* from, int lanes) {
    if (lanes == Vector::kWidth) return load(from);
    float32x4_t value = vdupq_n_f32(0.0f);
    if (lanes > 0) value = vld1q_lane_f32(from, value, 0);
    if (lanes > 1) value = vld1q_lane_f32(from + 1, value, 1);
    if (lanes > 2) value = vld1q_lane_f32(from + 2, value, 2);
    return Vector(value);
}
template <typename T>
inline Vector load_first(const T* from, int lanes) {
    if (lanes == Vector::kWidth) return load(from);
    const uint16_t* const numbers = &from->bits;
    uint16x4_t bits = vdup_n_u16(0);
    if (lanes > 0) bits = vld1_lane_u16(numbers, bits, 0);
    if (lanes > 1) bits = vld1_lane_u16(numbers + 1, bits, 1);
    if (lanes > 2) bits = vld1_lane_u16(numbers + 2, bits, 2);
    return widened<T>(bits);
}

inline void store(float* to, Vector v) { vst1q_f32(to, v.value); }
inline void store_first(float* to, Vector v, int lanes) {
    if (lanes == Vector::kWidth) return store(to, v);
    if (lanes > 0) vst1q_lane_f32(to, v.value, 0);
    if (lanes > 1) vst1q_lane_f32(to + 1, v.value, 1);
    if (lanes > 2) vst1q_lane_f32(to + 2, v.value, 2);
}

inline Vector operator+(Vector a, Vector b) { return Vector(vaddq_f32(a.value, b.value)); }
inline Vector operator-(Vector a, Vector b) { return Vector(vsubq_f32(a.value, b.value)); }
inline Vector operator*(Vector a, Vector b) { return Vector(vmulq_f32(a.value, b.value)); }
inline Vector operator/(Vector a, Vector b) { return Vector(vdivq_f32(a.value, b.value)); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return Vector(vfmaq_f32(c.value, a.value, b.value)); }

inline Mask operator<(Vector a, Vector b) { return {vcltq_f32(a.value, b.value)}; }
inline Mask operator>(Vector a, Vector b) { return {vcgtq_f32(a.value, b.value)}; }
inline Mask operator>=(Vector a, Vector b) { return {vcgeq_f32(a.value, b.value)}; }
inline Mask operator==(Vector a, Vector b) { return {vceqq_f32(a.value, b.value)}; }

inline Vector select(Mask mask, Vector yes, Vector no) { return Vector(vbslq_f32(mask.bits, yes.value, no.value)); }
// A NaN of `value` survives and one of `bound` does not: the instructions for minimum and maximum keep either.
inline Vector minimum(Vector value, Vector bound) { return select(bound < value, bound, value); }
inline Vector maximum(Vector value, Vector bound) { return select(bound > value, bound, value); }

struct Parts {
    Vector exponent, mantissa;
};

inline Parts parts_of(Vector v) {
    const int32x4_t bits = vreinterpretq_s32_f32(v.value);
    const int32x4_t exponent = vsubq_s32(vshrq_n_s32(bits, 23), vdupq_n_s32(127));
    const int32x4_t fraction = vandq_s32(bits, vdupq_n_s32(0x007fffff));
    return {Vector(vcvtq_f32_s32(exponent)),
            Vector(vreinterpretq_f32_s32(vorrq_s32(fraction, vdupq_n_s32(0x3f800000))))};
}
inline Vector rounded(Vector v) { return Vector(vrndnq_f32(v.value)); }
// Two factors, because 2^128 and the subnormal powers have no normal representation.
inline Vector scaled_by_power_of_two(Vector value, Vector n) {
    const int32x4_t power = vcvtq_s32_f32(n.value), one = vdupq_n_s32(0x3f800000);
    const int32x4_t half = vshrq_n_s32(power, 1), rest = vsubq_s32(power, half);
    const float32x4_t first = vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(half, 23), one));
    const float32x4_t second = vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(rest, 23), one));
    return Vector(vmulq_f32(vmulq_f32(value.value, first), second));
}

inline float sum(Vector v) {
    const float32x2_t two = vadd_f32(vget_low_f32(v.value), vget_high_f32(v.value));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float lowest(Vector v) {
    const float32x2_t low = vget_low_f32(v.value), high = vget_high_f32(v.value);
    const float32x2_t two = vbsl_f32(vclt_f32(high, low), high, low);
    return vgpo::minimum(vget_lane_f32(two, 0), vget_lane_f32(two, 1));
}
inline float highest(Vector v) {
    const float32x2_t low = vget_low_f32(v.value), high = vget_high_f32(v.value);
    const float32x2_t two = vbsl_f32(vcgt_f32(high, low), high, low);
    return vgpo::maximum(vget_lane_f32(two, 0), vget_lane_f32(two, 1));
}

struct FixedSum {
    int64x2_t total = vdupq_n_s64(0);
    float64x2_t scale;

    explicit FixedSum(double fixed_scale) : scale(vdupq_n_f64(fixed_scale)) {}

    inline int64x2_t fixed(float64x2_t values) const {
        float64x2_t scaled = vmulq_f64(values, scale);
        scaled = vmaxq_f64(scaled, vdupq_n_f64(-kFixedLimit));
        scaled = vminq_f64(scaled, vdupq_n_f64(kFixedLimit));
        return vcvtnq_s64_f64(scaled);
    }
    inline void add(Vector v) {
        total = vaddq_s64(total, fixed(vcvt_f64_f32(vget_low_f32(v.value))));
        total = vaddq_s64(total, fixed(vcvt_high_f64_f32(v.value)));
    }
    inline int64_t value() const { return vaddvq_s64(total); }
};

struct Keys {
    int32x4_t value;
};

inline Keys order_keys(Vector v) {
    const int32x4_t bits = vreinterpretq_s32_f32(vaddq_f32(v.value, vdupq_n_f32(0.0f)));
    return {veorq_s32(bits, vandq_s32(vshrq_n_s32(bits, 31), vdupq_n_s32(0x7fffffff)))};
}
inline void store(int32_t* to, Keys keys) { vst1q_s32(to, keys.value); }
inline int count_at_least(const int32_t* keys, int32_t bound) {
    return count(Mask{vcgeq_s32(vld1q_s32(keys), vdupq_n_s32(bound))});
}
