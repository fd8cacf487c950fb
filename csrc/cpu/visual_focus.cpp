#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <numeric>

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
// Rows of an item of work that sums them as unit vectors, for which it needs whole rows. Bits depend on it.
constexpr int64_t kUnitRows = 256;
// Bytes of hidden states in one item of work for cosines: enough to hide the cost of taking it.
constexpr int64_t kItemBytes = 512 * 1024;

int64_t element_bytes(HiddenType type) { return type == HiddenType::kFloat ? 4 : 2; }

const void* address_of(const FocusTensors& input, int64_t offset) {
    return static_cast<const char*>(input.hidden) + offset * element_bytes(input.type);
}

// Consecutive tokens of a response that are compared with one prototype. There is one view in a response whose images
// all precede its tokens, and more where images arrive in between or prototypes are given for each token.
struct View {
    int64_t response;
    int64_t begin, end;  // tokens
    int64_t first_row;   // of the visual rows, by ordinal, that the view before did not see
    int64_t seen_rows;   // visual rows that the view sees; those of the views before among them
    int64_t prototype;   // place among the prototypes
};

using Positions = std::vector<int64_t>;  // of a response's visual rows, counted from its first row

std::vector<Positions> visual_positions(const FocusTensors& input) {
    const Layout& layout = input.layout;
    std::vector<Positions> positions(layout.batch);
    parallel_items(layout.batch, [&](int64_t b) {
        const int64_t begin = layout.row_begin(b), length = layout.row_end(b) - begin;
        positions[b].resize(length);
        positions[b].resize(select_positions(input.visual_mask + begin, length, positions[b].data()));
    });
    return positions;
}

// One view for each response, which sees all its visual rows.
std::vector<View> whole_views(const Layout& layout, const std::vector<Positions>& visual) {
    std::vector<View> views;
    for (int64_t b = 0; b < layout.batch; ++b) {
        const int64_t rows = static_cast<int64_t>(visual[b].size());
        views.push_back({b, layout.token_begin(b), layout.token_end(b), 0, rows, b});
    }
    return views;
}

// Cuts responses at the visual rows between their scored tokens. A token sees the rows before its own.
std::vector<View> causal_views(const Layout& layout, const std::vector<Positions>& visual, const bool* response_mask) {
    std::vector<View> views;
    for (int64_t b = 0; b < layout.batch; ++b) {
        const int64_t end = layout.token_end(b);
        // The first row of the response, as a token.
        const int64_t origin = layout.token_begin(b) - (layout.row_of(b, layout.token_begin(b)) - layout.row_begin(b));
        int64_t begin = layout.token_begin(b), rows = 0;
        while (begin < end) {
            const void* found = std::memchr(response_mask + begin, 1, static_cast<size_t>(end - begin));
            if (found == nullptr) break;
            const int64_t scored = static_cast<const bool*>(found) - response_mask;
            const auto next = std::lower_bound(visual[b].begin() + rows, visual[b].end(), scored - origin);
            const int64_t until = next == visual[b].end() ? end : std::min(end, origin + *next + 1);
            const int64_t seen = next - visual[b].begin();
            views.push_back({b, begin, until, rows, seen, static_cast<int64_t>(views.size())});
            begin = until, rows = seen;
        }
        if (begin < end) views.push_back({b, begin, end, 0, 0, -1});  // without a scored token
    }
    return views;
}

// Cuts responses where the row of their given prototype changes.
std::vector<View> given_views(const FocusTensors& input) {
    const Layout& layout = input.layout;
    std::vector<View> views;
    for (int64_t b = 0; b < layout.batch; ++b) {
        const auto row_of = [&](int64_t token) {
            return input.prototype_index == nullptr ? b : input.prototype_index[input.index_per_token ? token : b];
        };
        const int64_t end = layout.token_end(b);
        for (int64_t begin = layout.token_begin(b), until = begin; begin < end; begin = until) {
            const int64_t row = row_of(begin);
            until = input.index_per_token ? begin + 1 : end;
            while (until < end && row_of(until) == row) ++until;
            views.push_back({b, begin, until, 0, 0, row});
        }
    }
    return views;
}

// From the sums of the rows that arrive with each of a response's views to the means of all that it sees, over some
// columns. Rows that arrive are summed by themselves and added to those before, so that no bit of a view depends on what
// comes after it.
void accumulate(const std::vector<View>& views, int64_t begin, int64_t end, int64_t stride, int64_t columns,
                float* means) {
    std::vector<double> total(end - begin > 1 ? columns : 0);  // of thousands of views, perhaps
    for (int64_t v = begin; v < end; ++v) {
        float* mean = means + v * stride;
        const float count = static_cast<float>(std::max<int64_t>(views[v].seen_rows, 1));
        for (size_t c = 0; c < total.size(); ++c) {
            total[c] += static_cast<double>(mean[c]);
            mean[c] = static_cast<float>(total[c]);
        }
        for (int64_t c = 0; c < columns; ++c) mean[c] /= count;
    }
}

// The sum, as unit vectors, of the visual rows that arrive with each view.
void sum_unit_views(const FocusTensors& input, const std::vector<Positions>& visual, const std::vector<View>& views,
                    float* sums /* [views, D] */) {
    const Layout& layout = input.layout;
    std::vector<int64_t> lengths;
    for (const View& view : views) lengths.push_back(view.seen_rows - view.first_row);
    const Pieces pieces(lengths, kUnitRows);
    std::vector<float> parts(pieces.count() * input.columns);
    const auto sum_rows = kernels().sum_unit_rows[static_cast<int>(input.type)];
    parallel_items(pieces.count(), [&](int64_t piece) {
        const int64_t v = pieces.sequence(piece), begin = pieces.begin(piece, v);
        const View& view = views[v];
        std::vector<float> room(2 * input.columns);
        sum_rows(address_of(input, input.strides.offset(layout, view.response, layout.row_begin(view.response))),
                 visual[view.response].data() + view.first_row + begin, std::min(kUnitRows, lengths[v] - begin),
                 input.strides.row, input.columns, room.data(), parts.data() + piece * input.columns);
    });
    parallel_items(static_cast<int64_t>(views.size()), [&](int64_t v) {
        float* sum = sums + v * input.columns;
        std::fill_n(sum, input.columns, 0.0f);
        for (int64_t piece = pieces.first(v); piece < pieces.first(v + 1); ++piece) {
            const float* part = parts.data() + piece * input.columns;
            for (int64_t c = 0; c < input.columns; ++c) sum[c] += part[c];
        }
    });
}

// The mean of the visual rows that each view sees.
void average(const FocusTensors& input, const std::vector<Positions>& visual, const std::vector<View>& views,
             float* means /* [views, D] */) {
    const Layout& layout = input.layout;
    std::vector<int64_t> first_view(layout.batch + 1);
    for (const View& view : views) ++first_view[view.response + 1];
    std::partial_sum(first_view.begin(), first_view.end(), first_view.begin());
    if (input.unit) {
        sum_unit_views(input, visual, views, means);
        parallel_items(layout.batch, [&](int64_t b) {
            accumulate(views, first_view[b], first_view[b + 1], input.columns, input.columns, means);
        });
        return;
    }

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
        const void* first = address_of(input, input.strides.offset(layout, b, layout.row_begin(b)) + column);
        std::vector<float> room(2 * columns);
        for (int64_t v = first_view[b]; v < first_view[b + 1]; ++v) {
            const View& view = views[v];
            sum_rows(first, visual[b].data() + view.first_row, view.seen_rows - view.first_row, input.strides.row,
                     columns, room.data(), means + v * input.columns + column);
        }
        accumulate(views, first_view[b], first_view[b + 1], input.columns, columns, means + column);
    });
}

// Prototypes as the cosines need them: null without an image.
struct Prototypes {
    std::vector<float> arranged;  // [count, D]
    std::vector<const float*> rows;
    std::vector<float> norms;

    Prototypes(const FocusTensors& input, const float* source, int64_t count)
        : arranged(count * input.columns), rows(count, nullptr), norms(count) {
        parallel_items(count, [&](int64_t i) {
            const float* values = source + i * input.columns;
            float* row = arranged.data() + i * input.columns;
            kernels().arrange[static_cast<int>(input.type)](values, input.columns, row);
            // A mean of unit vectors is kept as it is: its product with a token's is the mean of the cosines.
            norms[i] = input.unit ? 1.0f : kernels().norm(values, input.columns);
            rows[i] = row;
        });
    }
};

}  // namespace

void visual_focus(const FocusTensors& input, const bool* response_mask, float* cos) {
    const Layout& layout = input.layout;
    const bool given = input.prototype != nullptr;
    const std::vector<Positions> visual = given ? std::vector<Positions>() : visual_positions(input);
    const std::vector<View> views = given ? given_views(input)
                                          : input.causal ? causal_views(layout, visual, response_mask)
                                                         : whole_views(layout, visual);
    std::vector<float> means;
    if (!given) {
        means.resize(views.size() * input.columns);
        average(input, visual, views, means.data());
    }
    const int64_t count = given ? input.num_prototypes : static_cast<int64_t>(views.size());
    Prototypes prototypes(input, given ? input.prototype : means.data(), count);
    // Zeros stand for a response without image where prototypes are given.
    for (int64_t i = 0; i < count; ++i) {
        const float* row = prototypes.rows[i];
        const auto nonzero = [](float value) { return value != 0.0f; };
        const bool seen = given ? std::any_of(row, row + input.columns, nonzero) : views[i].seen_rows > 0;
        if (!seen) prototypes.rows[i] = nullptr;
    }

    std::vector<int64_t> lengths;
    for (const View& view : views) lengths.push_back(view.end - view.begin);
    const int64_t row_bytes = input.columns * element_bytes(input.type);
    const Pieces pieces(lengths, std::max<int64_t>(kItemBytes / row_bytes, 1));
    const auto cosines = kernels().cosines[static_cast<int>(input.type)];
    parallel_items(pieces.count(), [&](int64_t piece) {
        const int64_t v = pieces.sequence(piece);
        const View& view = views[v];
        const int64_t begin = view.begin + pieces.begin(piece, v);
        const int64_t length = std::min(pieces.length(), view.end - begin);
        std::fill_n(cos + begin, length, 0.0f);
        std::vector<int64_t> valid(length);
        const int64_t scored = select_positions(response_mask + begin, length, valid.data());
        // Cosines come out side by side and move to their tokens afterwards.
        std::vector<float> values(scored, std::numeric_limits<float>::quiet_NaN());
        if (view.prototype >= 0 && prototypes.rows[view.prototype] != nullptr) {
            const int64_t row = layout.row_of(view.response, begin);
            cosines(address_of(input, input.strides.offset(layout, view.response, row)), valid.data(), scored,
                    input.strides.row, input.columns, prototypes.rows[view.prototype],
                    prototypes.norms[view.prototype], values.data());
        }
        for (int64_t i = 0; i < scored; ++i) cos[begin + valid[i]] = values[i];
    });
}

namespace ops {
namespace {

// The mean of the visual rows before each row.
void running_prototypes(const FocusTensors& input, float* means /* [R, D] */) {
    const Layout& layout = input.layout;
    const int64_t slices = input.unit ? 1 : std::max<int64_t>(input.columns / kNarrowestSlice, 1);
    const int64_t width = (input.columns + slices - 1) / slices;
    const auto sum_rows = (input.unit ? kernels().sum_unit_rows : kernels().sum_rows)[static_cast<int>(input.type)];
    parallel_items(layout.batch * slices, [&](int64_t item) {
        const int64_t b = item / slices, column = item % slices * width;
        const int64_t columns = std::min(width, input.columns - column);
        if (columns <= 0) return;
        std::vector<float> room(2 * columns), row(columns);
        std::vector<double> total(columns);
        int64_t count = 0;
        for (int64_t r = layout.row_begin(b); r < layout.row_end(b); ++r) {
            float* mean = means + r * input.columns + column;
            const float divisor = static_cast<float>(std::max<int64_t>(count, 1));
            for (int64_t c = 0; c < columns; ++c) mean[c] = static_cast<float>(total[c]) / divisor;
            if (!input.visual_mask[r]) continue;
            ++count;
            const int64_t itself = 0;
            sum_rows(address_of(input, input.strides.offset(layout, b, r) + column), &itself, 1, input.strides.row,
                     columns, room.data(), row.data());
            for (int64_t c = 0; c < columns; ++c) total[c] += static_cast<double>(row[c]);
        }
    });
}

Tensors visual_prototype(const ArgumentReader& reader) {
    const Layout layout = reader.layout("visual_mask");
    FocusTensors input = reader.hidden(layout);
    input.unit = reader.value<bool>("unit");
    const bool causal = reader.value<bool>("causal");
    const at::Tensor& hidden = reader.tensor("hidden");
    std::vector<int64_t> shape = {layout.batch, input.columns};
    if (causal) shape = hidden.sizes().vec();
    at::Tensor means = at::empty(shape, hidden.options().dtype(at::kFloat));
    if (causal) {
        running_prototypes(input, means.mutable_data_ptr<float>());
    } else {
        const std::vector<Positions> visual = visual_positions(input);
        average(input, visual, whole_views(layout, visual), means.mutable_data_ptr<float>());
    }
    return {means};
}

Tensors visual_focus(const ArgumentReader& reader) {
    const at::IntArrayRef tokens = reader.shape("response_mask");
    FocusTensors input = reader.focus(reader.layout("response_mask"));
    input.unit = reader.value<bool>("unit");
    const bool* mask = reader.data<bool>("response_mask", tokens);
    at::Tensor cos = at::empty(tokens, reader.tensor("hidden").options().dtype(at::kFloat));
    vgpo::visual_focus(input, mask, cos.mutable_data_ptr<float>());
    return {cos};
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("visual_prototype", by_name<visual_prototype, Values::kChecked>());
    library.impl("visual_focus", by_name<visual_focus, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
