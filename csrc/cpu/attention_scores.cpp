#include "attention_scores.h"

#include <algorithm>
#include <cstring>

#include "packing.h"

namespace vgpo {
namespace {

static_assert(kPanelKeys == kPanelColumns && kMatrixRows <= kPanelKeys);

// Copies rows of `size` numbers from `offsets` into neighbouring rows of `depth`, filled up with zeros.
void gather(const void* data, const int64_t* offsets, int64_t count, int64_t size, int64_t depth, BFloat16* rows) {
    for (int64_t r = 0; r < count; ++r) {
        BFloat16* row = rows + r * depth;
        std::memcpy(row, static_cast<const BFloat16*>(data) + offsets[r], static_cast<size_t>(size) * sizeof(BFloat16));
        std::fill(row + size, row + depth, BFloat16{0});
    }
}

}  // namespace

Scores::Scores(const AttentionTensors& input)
    : input_(input),
      on_matrix_units_(input.type == HiddenType::kBFloat16 && has_bf16_products()),
      scores_(kPanelKeys * std::max(kMatrixRows, kQueryRows)) {
    if (on_matrix_units_) {
        depth_ = (input.size + 1) / 2 * 2;
        rows_ = LineAligned<BFloat16>(kPanelKeys * depth_);
        packed_ = LineAligned<BFloat16>(kPanelKeys * depth_);
    } else {
        panel_.reset(new float[input.size * kPanelKeys]);
        room_.reset(new float[input.size * kQueryRows]);
    }
}

Scores::~Scores() {
    if (on_matrix_units_) release_products();
}

void Scores::pack(const int64_t* offsets, int64_t count) {
    keys_ = count;
    if (!on_matrix_units_) {
        kernels().pack_keys[static_cast<int>(input_.type)](input_.k.data, offsets, count, input_.size, panel_.get());
        return;
    }
    gather(input_.k.data, offsets, count, input_.size, depth_, rows_.data());
    pack_panel({rows_.data(), depth_, count, 1, depth_}, 0, kPanelColumns, depth_, packed_.data());
}

void Scores::multiply(const int64_t* offsets, int64_t count) {
    if (!on_matrix_units_) {
        kernels().attention_scores[static_cast<int>(input_.type)](input_.q.data, offsets, count, panel_.get(), keys_,
                                                                  input_.size, input_.scale, room_.get(),
                                                                  scores_.data());
        return;
    }
    // A whole tile whatever the count: one kernel for all, and rows are independent of each other.
    gather(input_.q.data, offsets, count, input_.size, depth_, rows_.data());
    std::fill(rows_.data() + count * depth_, rows_.data() + kMatrixRows * depth_, BFloat16{0});
    multiply_panel(rows_.data(), kMatrixRows, depth_, packed_.data(), kPanelColumns, depth_, scores_.data(), kPanelKeys,
                   false);
    for (int64_t i = 0; i < count * kPanelKeys; ++i) scores_.data()[i] *= input_.scale;
}

}  // namespace vgpo
