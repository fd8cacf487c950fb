// Matrix products of warpgroups that are on their way: begun, and not yet waited for.
//
// Their operands are read at some time until a thread has waited for them, and what they write is in the threads'
// registers only then. As long, the registers are poisoned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <list>
#include <vector>

namespace emulation {

constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64, kGroupComponents = 16;  // of a product; of columns it has 64 or 256

// Where a synchronisation stands in the source: threads that meet must meet at the same place.
struct Site {
    const char* file = nullptr;
    int line = 0;
    bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

// The sums of products, taken from the threads' registers. Thread 32 w + 4 g + t holds, as 4 j + 2 h + i of its sums,
// the one of row 16 w + g + 8 h in column 8 j + 2 t + i.
struct GroupSums {
    int columns;
    std::vector<float> values = std::vector<float>(static_cast<size_t>(kGroupRows) * columns);
    float* registers[kWarpgroup] = {};  // of the threads that have not got them back
    size_t products[kWarpgroup] = {};   // to wait for first
    int threads = 0;

    // A signalling NaN: who computes with it in place changes it.
    static constexpr unsigned kPoison = 0xffa5a5a5u;

    explicit GroupSums(int columns) : columns(columns) {}

    int of_thread() const { return kGroupRows * columns / kWarpgroup; }

    template <typename Use>
    void each(int thread, const Use& use) {
        const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
        for (int sum = 0; sum < of_thread(); ++sum) {
            const int own_row = row + sum / 2 % 2 * 8, own_column = sum / 4 * 8 + column + sum % 2;
            use(registers[thread][sum], values[static_cast<size_t>(own_row) * columns + own_column]);
        }
    }

    void take(int thread, float* from, bool with_values) {
        registers[thread] = from;
        ++threads;
        if (with_values) each(thread, [](float own, float& value) { value = own; });
        for (int sum = 0; sum < of_thread(); ++sum) std::memcpy(from + sum, &kPoison, sizeof kPoison);
    }

    bool untouched(int thread) const {
        unsigned different = 0;
        for (int sum = 0; sum < of_thread(); ++sum) {
            unsigned word;
            std::memcpy(&word, registers[thread] + sum, sizeof word);
            different |= word ^ kPoison;
        }
        return different == 0;
    }

    void give_back(int thread) {
        each(thread, [](float& own, float value) { own = value; });
        registers[thread] = nullptr;
        --threads;
    }
};

struct Product {
    uint64_t left = 0, right = 0;  // what is said of the operands
    std::vector<float> rows;       // the left one, if it comes from registers: component after component
    bool add = false;
    void (*multiply)(const Product&) = nullptr;
    Site site;
    GroupSums* sums = nullptr;
    int threads = 0;  // that have begun it
};

struct Warpgroup {
    std::vector<Product> products;
    size_t finished = 0;
    std::list<GroupSums> sums;  // that some thread has not got back
};

// What a thread knows of its warpgroup's products.
struct ThreadProducts {
    size_t begun = 0;
    std::vector<size_t> groups;  // products begun before the end of each
    bool fenced = false;
};

}  // namespace emulation
