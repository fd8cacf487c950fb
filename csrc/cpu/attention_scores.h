// Scores of a tile of queries by a panel of keys: on the vector units in fp32, or, for bfloat16, on the matrix units of
// processors that have them. Products of bfloat16 are exact in fp32, so that both differ by the order of sums alone.
#pragma once

#include <cstdint>
#include <memory>

#include "attention_keys.h"
#include "bf16_product.h"
#include "kernels.h"

namespace vgpo {

// Queries of a tile on the matrix units, which take sixteen rows at a time and two of those at once.
constexpr int64_t kMatrixRows = 32;

// One thread's panel, tile and scratch memory.
class Scores {
public:
    explicit Scores(const AttentionTensors& input);
    ~Scores();
    Scores(const Scores&) = delete;
    Scores& operator=(const Scores&) = delete;

    // Queries that multiply() takes at most.
    int64_t tile_rows() const { return on_matrix_units_ ? kMatrixRows : kQueryRows; }
    // Keeps up to kPanelKeys keys, whose first components lie at `offsets` in k.
    void pack(const int64_t* offsets, int64_t count);
    // Multiplies the queries at `offsets` in q by the panel. A score is the same whatever stands beside it.
    void multiply(const int64_t* offsets, int64_t count);
    // Scores of the tile's query r, kPanelKeys of them; those behind the panel's keys mean nothing.
    float* row(int64_t r) { return scores_.data() + r * kPanelKeys; }

private:
    const AttentionTensors& input_;
    bool on_matrix_units_;
    int64_t keys_ = 0;   // of the panel
    int64_t depth_ = 0;  // components of a row in `rows_`, an even number
    LineAligned<float> scores_;
    std::unique_ptr<float[]> panel_, room_;       // on the vector units
    LineAligned<BFloat16> rows_, packed_;         // on the matrix units
};

}  // namespace vgpo
