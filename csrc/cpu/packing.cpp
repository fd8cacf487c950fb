// Compiled for AVX-512 where that exists: processors with matrix units have it, and no others come here.

// Standard headers come before the pragma, so that no shared function is compiled for this instruction set.
#include <cstdint>
#include <cstring>

#include "packing.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifndef __clang__
// GCC's own header declares its undefined registers in a way that GCC 12 then warns about.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif
#endif

namespace vgpo {
namespace {

// Pairs of 16-bit numbers are moved as one 32-bit word, sixteen at a time.
constexpr int64_t kWords = 16;

// How many contiguous rows (or columns) ahead of its use a matrix is fetched: they are too far apart for the hardware to
// do it.
constexpr int64_t kRowsAhead = 2 * kWords;

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the numbers of a register come to lie when two are interleaved: within 128 bits, as the instruction does it.
int64_t interleaved_number(int64_t pair) { return pair / 4 * 8 + pair % 4; }

#if defined(__x86_64__) && defined(__GNUC__)

using Words = __m512i;

__mmask16 first_words(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

// The numbers [0, 2 * kWords) of `from` in pairs; zeros from `count` on.
Words load_numbers(const BFloat16* from, int64_t count) {
    if (count >= 2 * kWords) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1u : 0u, from);
}
// first[begin + i] and second[begin + i] in pairs, i < count; zeros behind. `second` may be null.
Words side_by_side(const BFloat16* first, const BFloat16* second, int64_t begin, int64_t count) {
    const __mmask16 mask = first_words(count);
    const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + begin));
    if (second == nullptr) return low;
    const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + begin));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// Numbers of both, side by side: pair i of `low` is number interleaved_number(i) of each, of `high` the fourth behind.
void interleave(Words first, Words second, Words& low, Words& high) {
    low = _mm512_unpacklo_epi16(first, second);
    high = _mm512_unpackhi_epi16(first, second);
}
Words zeros() { return _mm512_setzero_si512(); }
void store(BFloat16* to, Words words) { _mm512_storeu_si512(to, words); }
void store_first(BFloat16* to, Words words, int64_t count) {
    _mm512_mask_storeu_epi32(to, first_words(count), words);
}

void transpose(Words* rows) {
    Words mixed[kWords];
    for (int i = 0; i < kWords; i += 2) {
        mixed[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        mixed[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kWords; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
    }
    // Every 128-bit lane holds a transposed 4 by 4 block: now the blocks change places.
    for (int i = 0; i < 4; ++i) {
        mixed[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        mixed[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        mixed[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        mixed[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(mixed[i + 4], mixed[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(mixed[i + 4], mixed[i + 12], 0xdd);
    }
}

#else

struct Words {
    BFloat16 numbers[2 * kWords];
};

Words zeros() { return {}; }
Words load_numbers(const BFloat16* from, int64_t count) {
    Words words = {};
    for (int64_t i = 0; i < smaller(count, 2 * kWords); ++i) words.numbers[i] = from[i];
    return words;
}
Words side_by_side(const BFloat16* first, const BFloat16* second, int64_t begin, int64_t count) {
    Words words = {};
    for (int64_t i = 0; i < count; ++i) {
        words.numbers[2 * i] = first[begin + i];
        if (second != nullptr) words.numbers[2 * i + 1] = second[begin + i];
    }
    return words;
}
void interleave(const Words& first, const Words& second, Words& low, Words& high) {
    for (int64_t i = 0; i < kWords; ++i) {
        const int64_t number = interleaved_number(i);
        low.numbers[2 * i] = first.numbers[number];
        low.numbers[2 * i + 1] = second.numbers[number];
        high.numbers[2 * i] = first.numbers[number + 4];
        high.numbers[2 * i + 1] = second.numbers[number + 4];
    }
}
void store_first(BFloat16* to, const Words& words, int64_t count) {
    std::memcpy(to, words.numbers, static_cast<size_t>(2 * count) * sizeof(BFloat16));
}
void store(BFloat16* to, const Words& words) { store_first(to, words, kWords); }

void transpose(Words* rows) {
    for (int64_t i = 0; i < kWords; ++i) {
        for (int64_t j = 0; j < 2 * i; ++j) {
            const BFloat16 number = rows[i].numbers[j];
            rows[i].numbers[j] = rows[j / 2].numbers[2 * i + j % 2];
            rows[j / 2].numbers[2 * i + j % 2] = number;
        }
    }
}

#endif

}  // namespace

void pack_panel(const BFloat16Matrix& matrix, int64_t column, int64_t width, int64_t depth, BFloat16* panel) {
    const int64_t present = smaller(width, matrix.columns - column);
    // Where element (k, c) lies next to the one below it, k even.
    const auto pair_at = [&](int64_t k, int64_t c) { return panel + (k / 2 * width + c) * 2; };
    if (matrix.column_stride == 1) {
        for (int64_t k = 0; k < depth; k += 2) {
            const BFloat16* first = matrix.data + k * matrix.row_stride + column;
            const BFloat16* second = k + 1 < matrix.rows ? first + matrix.row_stride : nullptr;
            prefetch(first + kRowsAhead * matrix.row_stride);
            prefetch(first + (kRowsAhead + 1) * matrix.row_stride);
            for (int64_t c = 0; c < width; c += kWords) {
                const int64_t count = smaller(present - c, kWords);
                store(pair_at(k, c), count > 0 ? side_by_side(first, second, c, count) : zeros());
            }
        }
        return;
    }
    for (int64_t c = 0; c < width; c += kWords) {
        for (int64_t k = 0; k < depth; k += 2 * kWords) {
            Words tile[kWords];
            for (int64_t i = 0; i < kWords; ++i) {
                const BFloat16* from = matrix.data + (column + c + i) * matrix.column_stride + k;
                tile[i] = c + i < present ? load_numbers(from, matrix.rows - k) : zeros();
            }
            transpose(tile);
            const int64_t pairs = smaller(kWords, (depth - k) / 2);
            for (int64_t pair = 0; pair < pairs; ++pair) store(pair_at(k + 2 * pair, c), tile[pair]);
        }
    }
}

void pack_rows(const BFloat16Matrix& matrix, int64_t begin, int64_t count, int64_t depth, int64_t stride,
               BFloat16* packed) {
    if (matrix.column_stride == 1) {
        const auto bytes = static_cast<size_t>(matrix.columns) * sizeof(BFloat16);
        for (int64_t r = 0; r < count; ++r) {
            std::memcpy(packed + r * stride, matrix.data + (begin + r) * matrix.row_stride, bytes);
            if (matrix.columns < depth) packed[r * stride + matrix.columns] = {0};
        }
        return;
    }
    // A cache line of each column at a time, so that none is fetched twice.
    for (int64_t k = 0; k < depth; k += 2 * kWords) {
        const int64_t pairs = smaller(kWords, (depth - k) / 2);
        for (int64_t r = 0; r < count; r += 2 * kWords) {
            const int64_t present = smaller(2 * kWords, count - r);
            Words low[kWords], high[kWords];
            for (int64_t pair = 0; pair < kWords; ++pair) {
                const int64_t column = k + 2 * pair;
                const BFloat16* from = matrix.data + column * matrix.column_stride + begin + r;
                prefetch(from + kRowsAhead * matrix.column_stride);
                prefetch(from + (kRowsAhead + 1) * matrix.column_stride);
                const Words first = column < matrix.columns ? load_numbers(from, present) : zeros();
                const bool last = column + 1 >= matrix.columns;
                const Words second = last ? zeros() : load_numbers(from + matrix.column_stride, present);
                interleave(first, second, low[pair], high[pair]);
            }
            transpose(low);
            transpose(high);
            for (int64_t i = 0; i < kWords; ++i) {
                const int64_t row = interleaved_number(i);
                BFloat16* const to = packed + (r + row) * stride + k;
                if (row < present) store_first(to, low[i], pairs);
                if (row + 4 < present) store_first(to + 4 * stride, high[i], pairs);
            }
        }
    }
}

}  // namespace vgpo

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
