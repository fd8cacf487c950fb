// Products of bfloat16 queries and keys by BFMMLA, which multiplies two rows of four components by two others. Include
// after kernels.h, inside the vector's namespace, with VGPO_BFMMLA defined.
//
// The instruction adds a pair of exact products to a sum at a time. It rounds both additions to odd: off by less than a
// unit in the last place where other instructions are off by half a unit, but once for two products. So the error of a
// score of d components has nearly the bound of a chain of d fused products: (d + 2) / 2^24 of the sum of their
// magnitudes. Whatever is below 2^-126 becomes zero on the way, a component too, and a product beyond the largest float
// becomes infinite.

constexpr int64_t kGroup = 4;  // components that are multiplied at a time
constexpr int kKeyPairs = 8;   // of a strip: with three pairs of queries, 24 of 32 registers hold sums
constexpr int kQueryPairs = kQueryRows / 2;
static_assert(kQueryRows % 2 == 0 && kPanelKeys % (2 * kKeyPairs) == 0);

// Groups of a row padded with zeros would not fit into the room for its floats below this size.
constexpr int64_t kLeastSize = 2;

// Writes a row's groups `step` numbers apart.
inline void store_groups(const BFloat16* from, int64_t size, int64_t step, uint16_t* to) {
    int64_t i = 0;
    for (; i + kGroup <= size; i += kGroup, to += step) vst1_u16(to, vld1_u16(&from[i].bits));
    if (i == size) return;
    uint16_t padded[kGroup] = {};
    for (int64_t rest = 0; i + rest < size; ++rest) padded[rest] = from[i + rest].bits;
    vst1_u16(to, vld1_u16(padded));
}

// Group i of key j lies at (i * kPanelKeys + j) * kGroup: a register holds those of two keys.
inline void pack_keys_by_groups(const void* keys, const int64_t* offsets, int64_t count, int64_t size, float* panel) {
    if (size < kLeastSize) return pack_keys<BFloat16>(keys, offsets, count, size, panel);
    uint16_t* const to = reinterpret_cast<uint16_t*>(panel);
    for (int64_t key = 0; key < count; ++key) {
        const BFloat16* from = static_cast<const BFloat16*>(keys) + offsets[key];
        store_groups(from, size, kPanelKeys * kGroup, to + key * kGroup);
    }
    for (int64_t i = 0; i < size; i += kGroup) {
        for (int64_t key = count; key < kPanelKeys; ++key) vst1_u16(to + i * kPanelKeys + key * kGroup, vdup_n_u16(0));
    }
}

VGPO_BFMMLA inline void multiply_strip(const uint16_t* queries, const uint16_t* panel, int64_t size, float scale,
                                       float* scores) {
    float32x4_t total[kQueryPairs][kKeyPairs];
    for (auto& row : total) {
        for (float32x4_t& v : row) v = vdupq_n_f32(0.0f);
    }
    for (int64_t i = 0; i < size; i += kGroup, queries += kQueryRows * kGroup, panel += kPanelKeys * kGroup) {
        bfloat16x8_t rows[kQueryPairs];
        for (int r = 0; r < kQueryPairs; ++r) rows[r] = vreinterpretq_bf16_u16(vld1q_u16(queries + r * 2 * kGroup));
        for (int k = 0; k < kKeyPairs; ++k) {
            const bfloat16x8_t keys = vreinterpretq_bf16_u16(vld1q_u16(panel + k * 2 * kGroup));
            for (int r = 0; r < kQueryPairs; ++r) total[r][k] = vbfmmlaq_f32(total[r][k], rows[r], keys);
        }
    }
    // A sum holds two scores of one query, then two of the other.
    for (int r = 0; r < kQueryPairs; ++r) {
        float* const first = scores + 2 * r * kPanelKeys;
        for (int k = 0; k < kKeyPairs; ++k) {
            const float32x4_t scaled = vmulq_n_f32(total[r][k], scale);
            vst1_f32(first + 2 * k, vget_low_f32(scaled));
            vst1_f32(first + kPanelKeys + 2 * k, vget_high_f32(scaled));
        }
    }
}

inline void multiply_groups(const void* queries, const int64_t* offsets, int64_t rows, const float* panel, int64_t keys,
                            int64_t size, float scale, float* room, float* scores) {
    if (size < kLeastSize) {
        return attention_scores<BFloat16>(queries, offsets, rows, panel, keys, size, scale, room, scores);
    }
    uint16_t* const packed = reinterpret_cast<uint16_t*>(room);
    for (int64_t r = 0; r < kQueryRows; ++r) {
        // A tile of fewer rows repeats its last one.
        const BFloat16* from = static_cast<const BFloat16*>(queries) + offsets[r < rows ? r : rows - 1];
        store_groups(from, size, kQueryRows * kGroup, packed + r * kGroup);
    }
    const uint16_t* const groups = reinterpret_cast<const uint16_t*>(panel);
    for (int64_t key = 0; key < keys; key += 2 * kKeyPairs) {
        multiply_strip(packed, groups + key * kGroup, size, scale, scores + key);
    }
}

constexpr Kernels with_bf16_products(Kernels table) {
    constexpr int kType = static_cast<int>(HiddenType::kBFloat16);
    table.name = "neon-bf16";
    table.pack_keys[kType] = pack_keys_by_groups;
    table.attention_scores[kType] = multiply_groups;
    return table;
}

constexpr Kernels kBf16Table = with_bf16_products(kTable);
