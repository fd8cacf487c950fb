// Numbers for the kernels' harness: arrays that end where memory ends, so that one read or written behind them ends the
// program, and a generator whose numbers are the same on every machine.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/simd/types.h"

template <typename T>
class Guarded {
public:
    explicit Guarded(int64_t count) : count_(count) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(T);
        const size_t readable = (bytes + page - 1) / page * page;
        size_ = readable + page;
        pages_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char* const end = static_cast<char*>(pages_) + readable;
        if (pages_ == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0) {
            std::perror("no guarded memory");
            std::exit(2);
        }
        // What a kernel leaves unwritten shows.
        std::memset(pages_, 0x5a, readable);
        data_ = reinterpret_cast<T*>(end - bytes);
    }
    ~Guarded() { munmap(pages_, size_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    T* data() { return data_; }
    const T* data() const { return data_; }
    int64_t count() const { return count_; }
    T& operator[](int64_t index) { return data_[index]; }
    const T& operator[](int64_t index) const { return data_[index]; }

private:
    int64_t count_;
    size_t size_;
    void* pages_;
    T* data_;
};

enum class Kind { kUsual, kWide, kSpecial };
constexpr Kind kKinds[] = {Kind::kUsual, Kind::kWide, Kind::kSpecial};
constexpr const char* kKindNames[] = {"usual", "wide", "special"};

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

    uint32_t next() {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state_ >> 32);
    }
    // In [-1, 1), a multiple of 2^-23.
    float symmetric() { return static_cast<float>(next() >> 8) * 0x1p-23f - 1.0f; }

    // Usual: in [-2, 2). Wide: up to 2^40. Special: usual, with one of a list at every fifth place on average.
    float number(Kind kind) {
        static const float specials[] = {0.0f,  -0.0f,     0x1p-149f, -0x1p-149f, 0x1.fp-130f, 0x1p-126f, 3e38f,
                                         -3e38f, INFINITY, -INFINITY, NAN};
        const float usual = 2.0f * symmetric();
        if (kind == Kind::kWide) return std::ldexp(usual, static_cast<int>(next() % 79) - 39);
        if (kind == Kind::kSpecial && next() % 5 == 0) return specials[next() % (sizeof specials / sizeof *specials)];
        return usual;
    }
    template <typename T>
    T stored(Kind kind);

    template <typename T>
    void fill(Guarded<T>& values, Kind kind) {
        for (int64_t i = 0; i < values.count(); ++i) values[i] = stored<T>(kind);
    }

private:
    uint64_t state_;
};

template <>
inline float Random::stored<float>(Kind kind) {
    return number(kind);
}
template <>
inline vgpo::BFloat16 Random::stored<vgpo::BFloat16>(Kind kind) {
    const float value = number(kind);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
}
// Usual: magnitudes of 2^-3 to 2. Wide: any finite number.
template <>
inline vgpo::Half Random::stored<vgpo::Half>(Kind kind) {
    static const uint16_t specials[] = {0x0000, 0x8000, 0x0001, 0x83ff, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00};
    const uint32_t sign = next() & 0x8000u, fraction = next() & 0x03ffu;
    const uint32_t exponent = kind == Kind::kWide ? next() % 31 : 12 + next() % 4;
    if (kind == Kind::kSpecial && next() % 5 == 0) return {specials[next() % (sizeof specials / sizeof *specials)]};
    return {static_cast<uint16_t>(sign | exponent << 10 | fraction)};
}

inline double wide(float value) { return value; }
inline double wide(vgpo::BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
inline double wide(vgpo::Half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
    const double sign = value.bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}
