// Four floats in the compiler's generic vector type: the interface of vector_avx512.h for any processor (SSE2 and
// NEON hold it in one register). Include inside `namespace vgpo::portable`.

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));

constexpr int kRegisters = 16;
// Rows read side by side; as many as fit the registers when each needs two sums.
constexpr int kStreams = 4;

struct Mask {
    Int4 bits;  // all ones or all zeros per lane
};

inline Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
inline Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
inline Mask operator!(Mask a) { return {~a.bits}; }
inline int count(Mask mask) { return -(mask.bits[0] + mask.bits[1] + mask.bits[2] + mask.bits[3]); }
inline bool any(Mask mask) { return count(mask) != 0; }
inline Mask first_lanes(int lanes) {
    const Int4 ordinals = {0, 1, 2, 3};
    return {ordinals < (Int4{} + lanes)};
}

struct Vector {
    static constexpr int kWidth = 4;
    Float4 value;

    Vector() = default;
    explicit Vector(float scalar) : value{scalar, scalar, scalar, scalar} {}
    explicit Vector(Float4 register_value) : value(register_value) {}
};

inline Vector load(const float* from) {
    Float4 value;
    __builtin_memcpy(&value, from, sizeof value);
    return Vector(value);
}
inline Vector load(const BFloat16* from) {
    const UInt4 bits = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
    return Vector((Float4)(bits << 16));
}
// Moves exponent and mantissa into place and rescales: exact for normal and subnormal numbers; an exponent of all
// ones (infinity, NaN) is put back by hand.
inline Vector load(const Half* from) {
    const UInt4 bits = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
    const UInt4 sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    const Float4 rebias = {0x1p112f, 0x1p112f, 0x1p112f, 0x1p112f};
    const UInt4 finite = (UInt4)((Float4)magnitude * rebias);
    const UInt4 special = (UInt4)(magnitude >= 0x0f800000u);
    return Vector((Float4)(sign | (special & (magnitude | 0x7f800000u)) | (~special & finite)));
}

struct Pair {
    Vector first, second;
};

inline Pair load_pair(const BFloat16* from) {
    UInt4 bits;
    __builtin_memcpy(&bits, from, sizeof bits);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return {Vector((Float4)(bits & 0xffff0000u)), Vector((Float4)(bits << 16))};
#else
    return {Vector((Float4)(bits << 16)), Vector((Float4)(bits & 0xffff0000u))};
#endif
}

// The first `lanes` elements, zeros behind them; memory behind them is not touched.
template <typename T>
inline Vector load_first(const T* from, int lanes) {
    if (lanes == Vector::kWidth) return load(from);
    T padded[Vector::kWidth] = {};
    for (int lane = 0; lane < lanes; ++lane) padded[lane] = from[lane];
    return load(padded);
}

inline void store(float* to, Vector v) { __builtin_memcpy(to, &v.value, sizeof v.value); }
inline void store_first(float* to, Vector v, int lanes) {
    if (lanes == Vector::kWidth) return store(to, v);
    for (int lane = 0; lane < lanes; ++lane) to[lane] = v.value[lane];
}

inline Vector operator+(Vector a, Vector b) { return Vector(a.value + b.value); }
inline Vector operator-(Vector a, Vector b) { return Vector(a.value - b.value); }
inline Vector operator*(Vector a, Vector b) { return Vector(a.value * b.value); }
inline Vector operator/(Vector a, Vector b) { return Vector(a.value / b.value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return Vector(a.value * b.value + c.value); }

inline Mask operator<(Vector a, Vector b) { return {(Int4)(a.value < b.value)}; }
inline Mask operator>(Vector a, Vector b) { return {(Int4)(a.value > b.value)}; }
inline Mask operator>=(Vector a, Vector b) { return {(Int4)(a.value >= b.value)}; }
inline Mask operator==(Vector a, Vector b) { return {(Int4)(a.value == b.value)}; }

inline Vector select(Mask mask, Vector yes, Vector no) { return Vector(mask.bits ? yes.value : no.value); }
// A NaN of `value` survives, as in the scalar functions.
#ifdef __SSE2__  // of the form below GCC makes four instructions
inline Vector minimum(Vector value, Vector bound) { return Vector(_mm_min_ps(bound.value, value.value)); }
inline Vector maximum(Vector value, Vector bound) { return Vector(_mm_max_ps(bound.value, value.value)); }
#else
inline Vector minimum(Vector value, Vector bound) { return select(bound < value, bound, value); }
inline Vector maximum(Vector value, Vector bound) { return select(bound > value, bound, value); }
#endif

struct Parts {
    Vector exponent, mantissa;
};

inline Parts parts_of(Vector v) {
    const Int4 bits = (Int4)v.value;
    return {Vector(__builtin_convertvector((bits >> 23) - 127, Float4)),
            Vector((Float4)((bits & 0x007fffff) | 0x3f800000))};
}
// To nearest even for |v| < 2^22: the addition leaves no room for fraction bits.
inline Vector rounded(Vector v) {
    const Float4 shift = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    return Vector((v.value + shift) - shift);
}
// Two factors, because 2^128 and the subnormal powers have no normal representation.
inline Vector scaled_by_power_of_two(Vector value, Vector n) {
    const Int4 power = __builtin_convertvector(n.value, Int4);
    const Int4 half = power >> 1, rest = power - half;
    return Vector(value.value * (Float4)((half + 127) << 23) * (Float4)((rest + 127) << 23));
}

inline float sum(Vector v) { return (v.value[0] + v.value[2]) + (v.value[1] + v.value[3]); }
inline float lowest(Vector v) {
    return vgpo::minimum(vgpo::minimum(v.value[0], v.value[2]), vgpo::minimum(v.value[1], v.value[3]));
}
inline float highest(Vector v) {
    return vgpo::maximum(vgpo::maximum(v.value[0], v.value[2]), vgpo::maximum(v.value[1], v.value[3]));
}

struct FixedSum {
    int64_t total = 0;
    double scale;

    explicit FixedSum(double fixed_scale) : scale(fixed_scale) {}

    inline void add(Vector v) {
        for (int lane = 0; lane < Vector::kWidth; ++lane) total += to_fixed(v.value[lane], scale);
    }
    inline int64_t value() const { return total; }
};

struct Keys {
    Int4 value;
};

inline Keys order_keys(Vector v) {
    const Int4 bits = (Int4)(v.value + Float4{});
    return {bits ^ ((bits >> 31) & 0x7fffffff)};
}
inline void store(int32_t* to, Keys keys) { __builtin_memcpy(to, &keys.value, sizeof keys.value); }
inline int count_at_least(const int32_t* keys, int32_t bound) {
    Int4 loaded;
    __builtin_memcpy(&loaded, keys, sizeof loaded);
    return count(Mask{loaded >= (Int4{} + bound)});
}
