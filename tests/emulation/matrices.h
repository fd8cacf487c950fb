// The tensor cores' instructions as csrc/cuda/mma.cuh names them: a warp's lanes lend each other their operands.
// cuda_emulation.h includes this at its end.
#pragma once

namespace emulation {

// Calls use(lanes) between two meetings of the warp, where lanes[i] is what lane i lent; nothing of it changes then.
template <typename Lent, typename Use>
void with_lanes(const Lent& own, Site site, const Use& use) {
    const auto payload = reinterpret_cast<uint64_t>(&own);
    machine().warp_exchange(Exchange::kSync, 0xffffffffu, payload, 0, site);
    const Fiber* fibers = machine().warp_lanes();
    const Lent* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = reinterpret_cast<const Lent*>(fibers[lane].payload);
    use(lanes);
    machine().warp_exchange(Exchange::kSync, 0xffffffffu, payload, 0, site);
}

struct MatrixRow {
    const unsigned char* address;
};

inline const unsigned char* checked_row(const MatrixRow* row, Site site) {
    if (reinterpret_cast<uintptr_t>(row->address) % 16 != 0) machine().fail("misaligned row of a matrix", site);
    return row->address;
}

inline void load_matrices(unsigned (&words)[4], const void* row, EMULATION_SITE) {
    const Site site{file, line};
    const int lane = machine().current().lane;
    with_lanes(MatrixRow{static_cast<const unsigned char*>(row)}, site, [&](const MatrixRow* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            std::memcpy(&words[matrix], checked_row(lanes[8 * matrix + lane / 4], site) + lane % 4 * 4, 4);
        }
    });
}

inline void load_transposed_matrices(unsigned (&words)[4], const void* row, EMULATION_SITE) {
    const Site site{file, line};
    const int lane = machine().current().lane;
    with_lanes(MatrixRow{static_cast<const unsigned char*>(row)}, site, [&](const MatrixRow* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                std::memcpy(&pair[i], checked_row(lanes[8 * matrix + lane % 4 * 2 + i], site) + lane / 4 * 2, 2);
            }
            std::memcpy(&words[matrix], pair, 4);
        }
    });
}

// Numbers of a 32-bit word of an operand.
inline int unpack_word(unsigned word, const float*, float* values) {
    values[0] = __uint_as_float(word & 0xffffe000u);  // the units ignore what TF32 has no place for
    return 1;
}
inline int unpack_word(unsigned word, const __half*, float* values) {
    values[0] = __half2float({static_cast<uint16_t>(word & 0xffffu)});
    values[1] = __half2float({static_cast<uint16_t>(word >> 16)});
    return 2;
}
inline int unpack_word(unsigned word, const __nv_bfloat16*, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
    return 2;
}

struct MatrixOperands {
    float left[8], right[4];  // the lane's words in order, unpacked
};

template <typename T>
void add_products(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2], const T* type,
                  EMULATION_SITE) {
    MatrixOperands own;
    int width = 0;
    for (int i = 0; i < 4; ++i) width = unpack_word(left[i], type, own.left + i * (sizeof(T) == 2 ? 2 : 1));
    for (int i = 0; i < 2; ++i) unpack_word(right[i], type, own.right + i * width);
    const int quad = machine().current().lane / 4, place = machine().current().lane % 4;
    with_lanes(own, {file, line}, [&](const MatrixOperands* const* lanes) {
        for (int word = 0; word < 8; ++word) {  // of a row's 32 bytes
            const int holder = word % 4, upper = word / 4;
            for (int i = 0; i < width; ++i) {
                const MatrixOperands& row = *lanes[4 * quad + holder];
                for (int c = 0; c < 2; ++c) {
                    const float factor = lanes[4 * (2 * place + c) + holder]->right[upper * width + i];
                    sums[c] += row.left[2 * upper * width + i] * factor;
                    sums[2 + c] += row.left[(2 * upper + 1) * width + i] * factor;
                }
            }
        }
    });
}

// To nearest, ties away from zero.
inline unsigned round_to_tf32(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return value != value ? 0x7fffffffu : bits;
    return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace emulation
