// Eight floats in an AVX register: the interface of vector_avx512.h. Include inside `namespace vgpo::avx2` and a
// region compiled for AVX2, FMA and F16C, after <immintrin.h>.

constexpr int kRegisters = 16;
// Rows read side by side; as many as fit the registers when each needs two sums.
constexpr int kStreams = 4;

struct Mask {
    __m256 bits;  // all ones or all zeros per lane
};

inline Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
inline Mask operator!(Mask a) {
    return {_mm256_xor_ps(a.bits, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
inline int count(Mask mask) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(mask.bits))); }
inline bool any(Mask mask) { return _mm256_movemask_ps(mask.bits) != 0; }
inline Mask first_lanes(int lanes) {
    const __m256i ordinals = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), ordinals))};
}

struct Vector {
    static constexpr int kWidth = 8;
    __m256 value;

    Vector() = default;
    explicit Vector(float scalar) : value(_mm256_set1_ps(scalar)) {}
    explicit Vector(__m256 register_value) : value(register_value) {}
};

inline Vector load(const float* from) { return Vector(_mm256_loadu_ps(from)); }
inline Vector load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vector(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}
inline Vector load(const Half* from) {
    return Vector(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

struct Pair {
    Vector first, second;
};

inline Pair load_pair(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i odd = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return {Vector(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))), Vector(_mm256_castsi256_ps(odd))};
}

// The first `lanes` elements, zeros behind them; memory behind them is not touched.
inline Vector load_first(const float* from, int lanes) {
    if (lanes == Vector::kWidth) return load(from);
    return Vector(_mm256_maskload_ps(from, _mm256_castps_si256(first_lanes(lanes).bits)));
}
template <typename T>
inline Vector load_first(const T* from, int lanes) {
    if (lanes == Vector::kWidth) return load(from);
    T padded[Vector::kWidth] = {};
    for (int lane = 0; lane < lanes; ++lane) padded[lane] = from[lane];
    return load(padded);
}

inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v.value); }
inline void store_first(float* to, Vector v, int lanes) {
    if (lanes == Vector::kWidth) return store(to, v);
    _mm256_maskstore_ps(to, _mm256_castps_si256(first_lanes(lanes).bits), v.value);
}

inline Vector operator+(Vector a, Vector b) { return Vector(_mm256_add_ps(a.value, b.value)); }
inline Vector operator-(Vector a, Vector b) { return Vector(_mm256_sub_ps(a.value, b.value)); }
inline Vector operator*(Vector a, Vector b) { return Vector(_mm256_mul_ps(a.value, b.value)); }
inline Vector operator/(Vector a, Vector b) { return Vector(_mm256_div_ps(a.value, b.value)); }
inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return Vector(_mm256_fmadd_ps(a.value, b.value, c.value));
}

inline Mask operator<(Vector a, Vector b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ)}; }
inline Mask operator>(Vector a, Vector b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_GT_OQ)}; }
inline Mask operator>=(Vector a, Vector b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_GE_OQ)}; }
inline Mask operator==(Vector a, Vector b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_EQ_OQ)}; }

inline Vector select(Mask mask, Vector yes, Vector no) {
    return Vector(_mm256_blendv_ps(no.value, yes.value, mask.bits));
}
// The instructions return their second operand when either is NaN: `value` goes there, so that its NaN survives.
inline Vector minimum(Vector value, Vector bound) { return Vector(_mm256_min_ps(bound.value, value.value)); }
inline Vector maximum(Vector value, Vector bound) { return Vector(_mm256_max_ps(bound.value, value.value)); }

struct Parts {
    Vector exponent, mantissa;
};

inline Parts parts_of(Vector v) {
    const __m256i bits = _mm256_castps_si256(v.value);
    const __m256i exponent = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
    return {Vector(_mm256_cvtepi32_ps(exponent)),
            Vector(_mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000))))};
}
inline Vector rounded(Vector v) {
    return Vector(_mm256_round_ps(v.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Two factors, because 2^128 and the subnormal powers have no normal representation.
inline Vector scaled_by_power_of_two(Vector value, Vector n) {
    const __m256i power = _mm256_cvtps_epi32(n.value), bias = _mm256_set1_epi32(127);
    const __m256i half = _mm256_srai_epi32(power, 1), rest = _mm256_sub_epi32(power, half);
    const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return Vector(_mm256_mul_ps(_mm256_mul_ps(value.value, first), second));
}

inline float sum(Vector v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.value), _mm256_extractf128_ps(v.value, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float lowest(Vector v) {
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(v.value), _mm256_extractf128_ps(v.value, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float highest(Vector v) { return -lowest(Vector(0.0f) - v); }

struct FixedSum {
    __m256i total = _mm256_setzero_si256();
    __m256d scale;

    explicit FixedSum(double fixed_scale) : scale(_mm256_set1_pd(fixed_scale)) {}

    // Adding 1.5 * 2^52 rounds to nearest even and leaves the integer in the low bits; valid up to kFixedLimit.
    inline __m256i fixed(__m128 values) const {
        const __m256d shift = _mm256_set1_pd(6755399441055744.0);
        __m256d scaled = _mm256_mul_pd(_mm256_cvtps_pd(values), scale);
        scaled = _mm256_max_pd(scaled, _mm256_set1_pd(-kFixedLimit));
        scaled = _mm256_min_pd(scaled, _mm256_set1_pd(kFixedLimit));
        const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(scaled, shift));
        return _mm256_sub_epi64(bits, _mm256_castpd_si256(shift));
    }
    inline void add(Vector v) {
        total = _mm256_add_epi64(total, fixed(_mm256_castps256_ps128(v.value)));
        total = _mm256_add_epi64(total, fixed(_mm256_extractf128_ps(v.value, 1)));
    }
    inline int64_t value() const {
        int64_t lanes[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
        return lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
};

struct Keys {
    __m256i value;
};

inline Keys order_keys(Vector v) {
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(v.value, _mm256_setzero_ps()));
    const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7fffffff));
    return {_mm256_xor_si256(bits, flip)};
}
inline void store(int32_t* to, Keys keys) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), keys.value); }
// `bound` is above the smallest integer, so that bound - 1 exists.
inline int count_at_least(const int32_t* keys, int32_t bound) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
    const __m256i above = _mm256_cmpgt_epi32(loaded, _mm256_set1_epi32(bound - 1));
    return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(above))));
}
