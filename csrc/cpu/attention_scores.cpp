#include "attention_scores.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <cstring>

#include "packing.h"

#if defined(__x86_64__) && defined(__linux__)
// MKL's, which torch brings: threads that its functions use when this thread calls them, 0 for as many as otherwise.
// Returns the number before.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
#endif

namespace vgpo {
namespace {

// MKL cuts a product into a part for each thread, also where another one's work is running and a single thread is left
// to do all of them, and the order of a sum depends on the part.
int set_blas_threads([[maybe_unused]] int threads) {
#if defined(__x86_64__) && defined(__linux__)
    if (MKL_Set_Num_Threads_Local != nullptr) return MKL_Set_Num_Threads_Local(threads);
#endif
    return 0;
}

static_assert(kPanelKeys == kPanelColumns && kMatrixRows <= kPanelKeys);

// Copies rows of `size` numbers from `offsets` into neighbouring rows of `depth`, filled up with zeros.
void gather(const void* data, const int64_t* offsets, int64_t count, int64_t size, int64_t depth, BFloat16* rows) {
    for (int64_t r = 0; r < count; ++r) {
        BFloat16* row = rows + r * depth;
        std::memcpy(row, static_cast<const BFloat16*>(data) + offsets[r], static_cast<size_t>(size) * sizeof(BFloat16));
        std::fill(row + size, row + depth, BFloat16{0});
    }
}

at::Tensor matrix(float* values, int64_t rows, int64_t columns) {
    return at::from_blob(values, {rows, columns}, at::kFloat);
}

}  // namespace

Scores::Way Scores::way_of(const AttentionTensors& input) {
    if (input.type == HiddenType::kBFloat16 && has_bf16_products()) return Way::kMatrixUnits;
    return kernels().scores_by_blas ? Way::kBlas : Way::kVectorUnits;
}

int64_t Scores::rows_of(Way way) {
    return way == Way::kMatrixUnits ? kMatrixRows : way == Way::kBlas ? kBlasRows : kQueryRows;
}

Scores::Scores(const AttentionTensors& input)
    : input_(input), way_(way_of(input)), scores_(kPanelKeys * rows_of(way_)) {
    if (way_ == Way::kMatrixUnits) {
        depth_ = (input.size + 1) / 2 * 2;
        rows_ = LineAligned<BFloat16>(kPanelKeys * depth_);
        packed_ = LineAligned<BFloat16>(kPanelKeys * depth_);
        return;
    }
    panel_ = LineAligned<float>(input.size * kPanelKeys);
    if (way_ == Way::kVectorUnits) {
        room_ = LineAligned<float>(input.size * kQueryRows);
    } else {
        blas_threads_ = set_blas_threads(1);
    }
}

Scores::~Scores() {
    if (way_ == Way::kMatrixUnits) release_products();
    if (way_ == Way::kBlas) set_blas_threads(blas_threads_);
}

void Scores::take(std::vector<int64_t> offsets) {
    queries_ = std::move(offsets);
    if (way_ != Way::kBlas) return;
    const int64_t count = static_cast<int64_t>(queries_.size());
    const int64_t rows = (count + kBlasRows - 1) / kBlasRows * kBlasRows;
    if (rows > wide_rows_) {
        wide_ = LineAligned<float>(rows * input_.size);
        wide_rows_ = rows;
    }
    kernels().widen_rows[static_cast<int>(input_.type)](input_.q.data, queries_.data(), count, input_.size,
                                                        wide_.data());
    std::fill(wide_.data() + count * input_.size, wide_.data() + rows * input_.size, 0.0f);
}

void Scores::pack(const int64_t* offsets, int64_t count) {
    keys_ = count;
    if (way_ != Way::kMatrixUnits) {
        kernels().pack_keys[static_cast<int>(input_.type)](input_.k.data, offsets, count, input_.size, panel_.data());
        return;
    }
    gather(input_.k.data, offsets, count, input_.size, depth_, rows_.data());
    pack_panel({rows_.data(), depth_, count, 1, depth_}, 0, kPanelColumns, depth_, packed_.data());
}

void Scores::multiply(int64_t first, int64_t count) {
    const int64_t* const offsets = queries_.data() + first;
    if (way_ == Way::kVectorUnits) {
        kernels().attention_scores[static_cast<int>(input_.type)](input_.q.data, offsets, count, panel_.data(), keys_,
                                                                  input_.size, input_.scale, room_.data(),
                                                                  scores_.data());
        return;
    }
    // A whole tile whatever the count: one kernel for all, and rows are independent of each other.
    if (way_ == Way::kBlas) {
        at::Tensor scores = matrix(scores_.data(), kBlasRows, kPanelKeys);
        // Not through the dispatcher, to which this thread would have to tell that autograd is off.
        at::cpu::mm_out(scores, matrix(wide_.data() + first * input_.size, kBlasRows, input_.size),
                        matrix(panel_.data(), input_.size, kPanelKeys));
    } else {
        gather(input_.q.data, offsets, count, input_.size, depth_, rows_.data());
        std::fill(rows_.data() + count * depth_, rows_.data() + kMatrixRows * depth_, BFloat16{0});
        multiply_panel(rows_.data(), kMatrixRows, depth_, packed_.data(), kPanelColumns, depth_, scores_.data(),
                       kPanelKeys, false);
    }
    for (int64_t i = 0; i < count * kPanelKeys; ++i) scores_.data()[i] *= input_.scale;
}

}  // namespace vgpo
