#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>

#include "../arguments.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "stages.h"

namespace vgpo {
namespace {

// Columns of a prototype that one item of work sums: whole rows where there are responses enough for every thread,
// slices otherwise, never narrower than a few cache lines. Columns are independent, so the width changes no bit.
constexpr int64_t kNarrowestSlice = 256;
constexpr int64_t kItemsPerThread = 4;
// Bytes of hidden states in one item of work for cosines: enough to hide the cost of taking it.
constexpr int64_t kItemBytes = 512 * 1024;

int64_t element_bytes(HiddenType type) { return type == HiddenType::kFloat ? 4 : 2; }

const void* address_of(const FocusTensors& input, int64_t offset) {
    return static_cast<const char*>(input.hidden) + offset * element_bytes(input.type);
}

// Prototypes as the cosines need them: a row and its norm for each response, null without an image.
struct Prototypes {
    std::vector<float> arranged;  // [B, D]
    std::vector<const float*> rows;
    std::vector<float> norms;
};

// The means of the visual rows, or the given prototypes that are not zero: zeros stand for a response without image.
Prototypes find_prototypes(const FocusTensors& input) {
    const int64_t batch = input.layout.batch, columns = input.columns;
    std::vector<float> means;
    std::vector<int64_t> visual_counts(batch);
    if (input.prototype == nullptr) {
        means.resize(batch * columns);
        visual_prototype(input, means.data(), visual_counts.data());
    }
    Prototypes found = {std::vector<float>(batch * columns), std::vector<const float*>(batch, nullptr),
                        std::vector<float>(batch)};
    for (int64_t b = 0; b < batch; ++b) {
        const float* source = means.data() + b * columns;
        bool seen = visual_counts[b] > 0;
        if (input.prototype != nullptr) {
            const int64_t row = input.prototype_index == nullptr ? b : input.prototype_index[b];
            source = input.prototype + std::max<int64_t>(row, 0) * columns;
            const auto nonzero = [](float value) { return value != 0.0f; };
            seen = row >= 0 && std::any_of(source, source + columns, nonzero);
        }
        if (!seen) continue;
        float* arranged = found.arranged.data() + b * columns;
        kernels().arrange[static_cast<int>(input.type)](source, columns, arranged);
        found.norms[b] = kernels().norm(source, columns);
        found.rows[b] = arranged;
    }
    return found;
}

}  // namespace

void visual_prototype(const FocusTensors& input, float* means, int64_t* visual_counts) {
    const Layout& layout = input.layout;
    const int64_t wanted_items = kItemsPerThread * at::get_num_threads();
    const int64_t most_slices = std::max<int64_t>(input.columns / kNarrowestSlice, 1);
    const int64_t slices = std::clamp<int64_t>(wanted_items / std::max<int64_t>(layout.batch, 1), 1, most_slices);
    const int64_t even = (input.columns + slices - 1) / slices;
    const int64_t width = (even + kNarrowestSlice - 1) / kNarrowestSlice * kNarrowestSlice;
    const auto sum_rows = kernels().sum_rows[static_cast<int>(input.type)];
    parallel_items(layout.batch * slices, [&](int64_t item) {
        const int64_t b = item / slices, column = item % slices * width;
        const int64_t columns = std::min(width, input.columns - column);
        if (columns <= 0) return;
        const int64_t begin = layout.row_begin(b), length = layout.row_end(b) - begin;
        std::unique_ptr<int64_t[]> visual(new int64_t[length]);
        const int64_t count = select_positions(input.visual_mask + begin, length, visual.get());
        if (column == 0) visual_counts[b] = count;
        const void* first = address_of(input, input.strides.offset(layout, b, begin) + column);
        float* mean = means + b * input.columns + column;
        std::vector<float> room(2 * columns);
        sum_rows(first, visual.get(), count, input.strides.row, columns, room.data(), mean);
        for (int64_t c = 0; count > 0 && c < columns; ++c) mean[c] /= static_cast<float>(count);
    });
}

void visual_focus(const FocusTensors& input, const bool* response_mask, float* cos, bool* has_visual) {
    const Layout& layout = input.layout;
    const Prototypes prototypes = find_prototypes(input);
    std::vector<int64_t> lengths(layout.batch);
    for (int64_t b = 0; b < layout.batch; ++b) {
        has_visual[b] = prototypes.rows[b] != nullptr;
        lengths[b] = layout.token_end(b) - layout.token_begin(b);
    }
    const int64_t row_bytes = input.columns * element_bytes(input.type);
    const Pieces pieces(lengths, std::max<int64_t>(kItemBytes / row_bytes, 1));
    const auto cosines = kernels().cosines[static_cast<int>(input.type)];
    parallel_items(pieces.count(), [&](int64_t piece) {
        const int64_t b = pieces.response(piece), begin = layout.token_begin(b) + pieces.begin(piece, b);
        const int64_t length = std::min(pieces.length(), layout.token_end(b) - begin);
        std::fill_n(cos + begin, length, 0.0f);
        if (!has_visual[b]) return;
        std::vector<int64_t> valid(length);
        const int64_t count = select_positions(response_mask + begin, length, valid.data());
        const void* first = address_of(input, input.strides.offset(layout, b, layout.row_of(b, begin)));
        // Cosines come out side by side and move to their tokens afterwards.
        std::vector<float> values(count);
        cosines(first, valid.data(), count, input.strides.row, input.columns, prototypes.rows[b], prototypes.norms[b],
                values.data());
        for (int64_t i = 0; i < count; ++i) cos[begin + valid[i]] = values[i];
    });
}

namespace ops {
namespace {

Tensors visual_prototype(const ArgumentReader& reader) {
    const Layout layout = reader.layout("visual_mask");
    const FocusTensors input = reader.hidden(layout);
    at::Tensor means = at::empty({layout.batch, input.columns}, reader.tensor("hidden").options().dtype(at::kFloat));
    std::vector<int64_t> counts(layout.batch);
    vgpo::visual_prototype(input, means.mutable_data_ptr<float>(), counts.data());
    return {means};
}

Tensors visual_focus(const ArgumentReader& reader) {
    const at::IntArrayRef tokens = reader.shape("response_mask");
    const FocusTensors input = reader.focus(reader.layout("response_mask"));
    const bool* mask = reader.data<bool>("response_mask", tokens);
    at::Tensor cos = at::empty(tokens, reader.tensor("hidden").options().dtype(at::kFloat));
    std::unique_ptr<bool[]> has_visual(new bool[input.layout.batch]);
    vgpo::visual_focus(input, mask, cos.mutable_data_ptr<float>(), has_visual.get());
    return {cos};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("visual_prototype", by_name<visual_prototype, Values::kChecked>());
    library.impl("visual_focus", by_name<visual_focus, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
