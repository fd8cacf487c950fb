#include "ops.h"

#include <ATen/ops/empty.h>

#include <memory>

#include "arguments.h"
#include "masks.h"
#include "parallel.h"

namespace vgpo {
namespace {

// Columns of a prototype that one item of work sums: whole rows where there are responses enough for every thread,
// slices otherwise, never narrower than a few cache lines. Columns are independent, so the width changes no bit.
constexpr int64_t kNarrowestSlice = 256;
constexpr int64_t kItemsPerThread = 4;
// Bytes of hidden states in one item of work for cosines: enough to hide the cost of taking it.
constexpr int64_t kItemBytes = 256 * 1024;

// Where the rows of a response that a mask selects begin, in elements of `hidden`.
struct SelectedRows {
    std::unique_ptr<int64_t[]> offsets;  // compacted a response, from the response's first index on
    std::vector<int64_t> counts;         // [B]

    SelectedRows(int64_t rows, int64_t batch) : offsets(new int64_t[rows]), counts(batch) {}
};

int64_t element_size(HiddenType type) { return type == HiddenType::kFloat ? 4 : 2; }

const void* at_column(const FocusInput& input, int64_t column) {
    return static_cast<const char*>(input.hidden) + column * element_size(input.type);
}

SelectedRows select_visual_rows(const FocusInput& input) {
    const Layout& layout = input.layout;
    SelectedRows selected(layout.num_rows(), layout.batch);
    parallel_items(layout.batch, [&](int64_t b) {
        int64_t* offsets = selected.offsets.get() + layout.row_begin(b);
        int64_t count = 0;
        for (int64_t row = layout.row_begin(b); row < layout.row_end(b); ++row) {
            offsets[count] = input.strides.offset(layout, b, row);
            count += input.visual_mask[row];
        }
        selected.counts[b] = count;
    });
    return selected;
}

// Prototypes as the cosines need them: where the row of a response begins, null without an image, and its norm.
struct Prototypes {
    std::vector<float> arranged;  // [B, D]
    std::vector<const float*> rows;
    std::vector<float> norms;

    Prototypes(int64_t batch, int64_t columns) : arranged(batch * columns), rows(batch, nullptr), norms(batch) {}
};

// The means of the visual rows, or the given prototypes that are not zero: zeros stand for a response without image.
Prototypes find_prototypes(const FocusInput& input) {
    const Layout& layout = input.layout;
    std::vector<float> means;
    std::vector<int64_t> visual_counts(layout.batch);
    if (input.prototype == nullptr) {
        means.resize(layout.batch * input.columns);
        visual_prototype(input, means.data(), visual_counts.data());
    }
    Prototypes found(layout.batch, input.columns);
    parallel_items(layout.batch, [&](int64_t b) {
        const float* source = nullptr;
        if (input.prototype == nullptr) {
            source = visual_counts[b] > 0 ? means.data() + b * input.columns : nullptr;
        } else {
            const int64_t row = input.prototype_index == nullptr ? b : input.prototype_index[b];
            const float* given = input.prototype + std::max<int64_t>(row, 0) * input.columns;
            const auto nonzero = [](float value) { return value != 0.0f; };
            source = row >= 0 && std::any_of(given, given + input.columns, nonzero) ? given : nullptr;
        }
        if (source == nullptr) return;
        float* arranged = found.arranged.data() + b * input.columns;
        kernels().arrange[static_cast<int>(input.type)](source, input.columns, arranged);
        found.norms[b] = kernels().norm(source, input.columns);
        found.rows[b] = arranged;
    });
    return found;
}

}  // namespace

void visual_prototype(const FocusInput& input, float* means, int64_t* visual_counts) {
    const Layout& layout = input.layout;
    const SelectedRows visual = select_visual_rows(input);
    std::copy(visual.counts.begin(), visual.counts.end(), visual_counts);

    const int64_t wanted_items = kItemsPerThread * at::get_num_threads();
    const int64_t most_slices = std::max<int64_t>(input.columns / kNarrowestSlice, 1);
    const int64_t slices = std::clamp<int64_t>(wanted_items / std::max<int64_t>(layout.batch, 1), 1, most_slices);
    const int64_t even = (input.columns + slices - 1) / slices;
    const int64_t width = (even + kNarrowestSlice - 1) / kNarrowestSlice * kNarrowestSlice;
    parallel_items(layout.batch * slices, [&](int64_t item) {
        const int64_t b = item / slices, column = item % slices * width;
        const int64_t columns = std::min(width, input.columns - column);
        if (columns <= 0) return;
        float* mean = means + b * input.columns + column;
        const int64_t count = visual.counts[b];
        std::vector<float> room(2 * columns);
        kernels().sum_rows[static_cast<int>(input.type)](at_column(input, column),
                                                         visual.offsets.get() + layout.row_begin(b), count, columns,
                                                         room.data(), mean);
        for (int64_t c = 0; count > 0 && c < columns; ++c) mean[c] /= static_cast<float>(count);
    });
}

void visual_focus(const FocusInput& input, const bool* response_mask, float* cos, bool* has_visual) {
    const Layout& layout = input.layout;
    const Prototypes prototypes = find_prototypes(input);

    SelectedRows rows(layout.num_tokens(), layout.batch);
    std::unique_ptr<int64_t[]> tokens(new int64_t[layout.num_tokens()]);
    parallel_items(layout.batch, [&](int64_t b) {
        const int64_t begin = layout.token_begin(b), end = layout.token_end(b);
        std::fill(cos + begin, cos + end, 0.0f);
        has_visual[b] = prototypes.rows[b] != nullptr;
        int64_t count = 0;
        for (int64_t token = begin; has_visual[b] && token < end; ++token) {
            rows.offsets[begin + count] = input.strides.offset(layout, b, layout.row_of(b, token));
            tokens[begin + count] = token;
            count += response_mask[token];
        }
        rows.counts[b] = count;
    });

    const int64_t row_bytes = input.columns * element_size(input.type);
    const Pieces pieces(rows.counts, std::max<int64_t>(kItemBytes / row_bytes, 1));
    const auto cosines = kernels().cosines[static_cast<int>(input.type)];
    parallel_items(pieces.count(), [&](int64_t piece) {
        const int64_t b = pieces.response(piece), begin = pieces.begin(piece, b);
        const int64_t count = std::min(pieces.length(), rows.counts[b] - begin);
        const int64_t first = layout.token_begin(b) + begin;
        // A piece's tokens may have holes between them: cosines come out side by side and are spread afterwards.
        std::vector<float> values(count);
        cosines(input.hidden, rows.offsets.get() + first, count, input.columns, prototypes.rows[b],
                prototypes.norms[b], values.data());
        for (int64_t i = 0; i < count; ++i) cos[tokens[first + i]] = values[i];
    });
}

namespace ops {

at::Tensor visual_prototype(const at::Tensor& hidden, const at::Tensor& visual_mask,
                            const OptionalTensor& cu_seqlens) {
    Layout layout = layout_of(visual_mask, cu_seqlens);
    const FocusInput input = focus_input(hidden, visual_mask, layout, std::nullopt, std::nullopt);
    at::Tensor means = at::empty({layout.batch, input.columns}, hidden.options().dtype(at::kFloat));
    std::vector<int64_t> counts(layout.batch);
    vgpo::visual_prototype(input, means.mutable_data_ptr<float>(), counts.data());
    return means;
}

at::Tensor visual_focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                        const OptionalTensor& prototype_index) {
    Layout layout = layout_of(response_mask, cu_seqlens);
    const FocusInput input = focus_input(hidden, visual_mask, layout, prototype, prototype_index);
    const bool* mask = checked<bool>("response_mask", response_mask, response_mask.sizes());
    at::Tensor cos = at::empty(response_mask.sizes(), hidden.options().dtype(at::kFloat));
    std::unique_ptr<bool[]> has_visual(new bool[layout.batch]);
    vgpo::visual_focus(input, mask, cos.mutable_data_ptr<float>(), has_visual.get());
    return cos;
}

}  // namespace ops
}  // namespace vgpo
