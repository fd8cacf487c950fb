// Sixteen floats in an AVX-512 register. Include inside `namespace vgpo::avx512` and a region compiled for AVX-512
// (F, BW, DQ, VL), FMA and F16C, after <immintrin.h>.

constexpr int kRegisters = 32;
// Rows read side by side; as many as fit the registers when each needs two sums.
constexpr int kStreams = 8;

struct Mask {
    __mmask16 bits;
};

inline Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline Mask operator!(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
inline int count(Mask mask) { return __builtin_popcount(mask.bits); }
inline bool any(Mask mask) { return mask.bits != 0; }
inline Mask first_lanes(int lanes) { return {static_cast<__mmask16>((1u << lanes) - 1u)}; }

struct Vector {
    static constexpr int kWidth = 16;
    __m512 value;

    Vector() = default;
    explicit Vector(float scalar) : value(_mm512_set1_ps(scalar)) {}
    explicit Vector(__m512 register_value) : value(register_value) {}
};

inline Vector load(const float* from) { return Vector(_mm512_loadu_ps(from)); }
inline Vector load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vector(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
}
inline Vector load(const Half* from) {
    return Vector(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

// Two vectors of a row. A pair of BFloat16 comes apart into its even and its odd elements, which takes a shift and a
// mask where widening each half takes a shuffle more.
struct Pair {
    Vector first, second;
};

inline Pair load_pair(const BFloat16* from) {
    const __m512i bits = _mm512_loadu_si512(from);
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return {Vector(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))), Vector(_mm512_castsi512_ps(odd))};
}

// The first `lanes` elements, zeros behind them; memory behind them is not touched.
inline Vector load_first(const float* from, int lanes) {
    return Vector(_mm512_maskz_loadu_ps(first_lanes(lanes).bits, from));
}
inline Vector load_first(const BFloat16* from, int lanes) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(lanes).bits, from);
    return Vector(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
}
inline Vector load_first(const Half* from, int lanes) {
    return Vector(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(lanes).bits, from)));
}

inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v.value); }
inline void store_first(float* to, Vector v, int lanes) {
    _mm512_mask_storeu_ps(to, first_lanes(lanes).bits, v.value);
}

inline Vector operator+(Vector a, Vector b) { return Vector(_mm512_add_ps(a.value, b.value)); }
inline Vector operator-(Vector a, Vector b) { return Vector(_mm512_sub_ps(a.value, b.value)); }
inline Vector operator*(Vector a, Vector b) { return Vector(_mm512_mul_ps(a.value, b.value)); }
inline Vector operator/(Vector a, Vector b) { return Vector(_mm512_div_ps(a.value, b.value)); }
inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return Vector(_mm512_fmadd_ps(a.value, b.value, c.value));
}

inline Mask operator<(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ)}; }
inline Mask operator>(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_GT_OQ)}; }
inline Mask operator>=(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_GE_OQ)}; }
inline Mask operator==(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ)}; }

inline Vector select(Mask mask, Vector yes, Vector no) {
    return Vector(_mm512_mask_blend_ps(mask.bits, no.value, yes.value));
}
// The instructions return their second operand when either is NaN: `value` goes there, so that its NaN survives.
inline Vector minimum(Vector value, Vector bound) { return Vector(_mm512_min_ps(bound.value, value.value)); }
inline Vector maximum(Vector value, Vector bound) { return Vector(_mm512_max_ps(bound.value, value.value)); }

// value * 2^n for integral n, without overflow on the way: the instruction scales by any exponent.
inline Vector scaled_by_power_of_two(Vector value, Vector n) {
    return Vector(_mm512_scalef_ps(value.value, n.value));
}
// A normal number above zero as exponent and mantissa in [1, 2).
struct Parts {
    Vector exponent, mantissa;
};

inline Parts parts_of(Vector v) {
    return {Vector(_mm512_getexp_ps(v.value)),
            Vector(_mm512_getmant_ps(v.value, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src))};
}
inline Vector rounded(Vector v) {
    return Vector(_mm512_roundscale_ps(v.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Reductions fold halves onto each other: a fixed order, whatever the values.
inline float sum(Vector v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.value), _mm512_extractf32x8_ps(v.value, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float lowest(Vector v) { return _mm512_reduce_min_ps(v.value); }
inline float highest(Vector v) { return _mm512_reduce_max_ps(v.value); }

// A sum of round(value * scale) in 64 bits (math.h: to_fixed).
struct FixedSum {
    __m512i total = _mm512_setzero_si512();
    __m512d scale;

    explicit FixedSum(double fixed_scale) : scale(_mm512_set1_pd(fixed_scale)) {}

    inline __m512i fixed(__m256 values) const {
        __m512d scaled = _mm512_mul_pd(_mm512_cvtps_pd(values), scale);
        scaled = _mm512_max_pd(scaled, _mm512_set1_pd(-kFixedLimit));
        scaled = _mm512_min_pd(scaled, _mm512_set1_pd(kFixedLimit));
        return _mm512_cvtpd_epi64(scaled);
    }
    inline void add(Vector v) {
        total = _mm512_add_epi64(total, fixed(_mm512_castps512_ps256(v.value)));
        total = _mm512_add_epi64(total, fixed(_mm512_extractf32x8_ps(v.value, 1)));
    }
    inline int64_t value() const { return _mm512_reduce_add_epi64(total); }
};

// math.h's order_key in every lane.
struct Keys {
    __m512i value;
};

inline Keys order_keys(Vector v) {
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(v.value, _mm512_setzero_ps()));
    const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
    return {_mm512_xor_si512(bits, flip)};
}
inline void store(int32_t* to, Keys keys) { _mm512_storeu_si512(to, keys.value); }
inline int count_at_least(const int32_t* keys, int32_t bound) {
    return __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(bound)));
}
