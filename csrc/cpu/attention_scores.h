// Scores of a tile of queries by a panel of keys: on the vector units, by BLAS where the table of kernels asks for it,
// or, for bfloat16, on the matrix units of processors for which torch brings a kernel. Products of bfloat16 are exact
// in fp32, so that all differ by the order of sums alone (but ARM's matrix instruction, see attention_bfmmla.h).
#pragma once

#include <cstdint>
#include <vector>

#include "attention_keys.h"
#include "bf16_product.h"
#include "kernels.h"

namespace vgpo {

// Queries of a tile on the matrix units, which take sixteen rows at a time and two of those at once.
constexpr int64_t kMatrixRows = 32;
// Queries of a tile for BLAS, which packs what it multiplies: so many that this costs little.
constexpr int64_t kBlasRows = 256;
constexpr int64_t kMostRows = kBlasRows;
static_assert(kMostRows >= kMatrixRows && kMostRows >= kQueryRows);

// One thread's queries, panel, tile and scratch memory.
class Scores {
public:
    explicit Scores(const AttentionTensors& input);
    ~Scores();
    Scores(const Scores&) = delete;
    Scores& operator=(const Scores&) = delete;

    // Queries that multiply() takes at most.
    int64_t tile_rows() const { return rows_of(way_); }
    // The queries whose first components lie at `offsets` in q.
    void take(std::vector<int64_t> offsets);
    // Keeps up to kPanelKeys keys, whose first components lie at `offsets` in k.
    void pack(const int64_t* offsets, int64_t count);
    // Multiplies the queries [first, first + count) of those taken by the panel; `first` is a multiple of tile_rows().
    // A score is the same whatever stands beside it.
    void multiply(int64_t first, int64_t count);
    // Scores of the tile's query r, kPanelKeys of them; those behind the panel's keys mean nothing.
    float* row(int64_t r) { return scores_.data() + r * kPanelKeys; }

private:
    enum class Way { kVectorUnits, kBlas, kMatrixUnits };

    static Way way_of(const AttentionTensors& input);
    static int64_t rows_of(Way way);

    const AttentionTensors& input_;
    Way way_;
    std::vector<int64_t> queries_;
    int64_t keys_ = 0;   // of the panel
    int64_t depth_ = 0;  // components of a row in `rows_`, an even number
    LineAligned<float> scores_;
    LineAligned<float> panel_;             // but on the matrix units
    LineAligned<float> room_;              // on the vector units
    LineAligned<float> wide_;              // by BLAS: whole tiles of queries in fp32
    int64_t wide_rows_ = 0;
    int blas_threads_ = 0;  // of this thread before
    LineAligned<BFloat16> rows_, packed_;  // on the matrix units
};

}  // namespace vgpo
