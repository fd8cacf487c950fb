#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../arguments.h"
#include "attention_keys.h"
#include "attention_scores.h"
#include "parallel.h"

namespace vgpo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows (queries times heads) of one item of work: enough to repay the packing of a panel, which every item does.
constexpr int64_t kItemRows = 1024;
constexpr int64_t kItemsPerThread = 4;
// Floats of the backward pass's tile of queries by keys.
constexpr int64_t kTileFloats = 512 * 1024;

// A query of one head.
struct Row {
    int64_t token, head;  // in the response
    int64_t position;
};

// Makes them the queries of `scores`.
void take_rows(const AttentionTensors& input, int64_t b, const std::vector<Row>& rows, Scores& scores) {
    std::vector<int64_t> offsets;
    offsets.reserve(rows.size());
    for (const Row& row : rows) offsets.push_back(input.q.offset(b, row.head, row.token));
    scores.take(std::move(offsets));
}

std::vector<KeyOrder> key_orders(const AttentionTensors& input) {
    std::vector<KeyOrder> orders;
    orders.reserve(input.batch);
    for (int64_t b = 0; b < input.batch; ++b) orders.emplace_back(input, b);
    return orders;
}

// The segments of a response, cut into panels.
std::vector<Run> panels_of(const KeyOrder& order) {
    std::vector<Run> panels;
    for (const Run& run : order.segments()) {
        for (int64_t begin = run.begin; begin < run.end; begin += kPanelKeys) {
            panels.push_back({run.segment, begin, std::min(begin + kPanelKeys, run.end)});
        }
    }
    return panels;
}

void pack_panel(const AttentionTensors& input, int64_t b, int64_t key_head, const KeyOrder& order, const Run& panel,
                Scores& scores) {
    int64_t offsets[kPanelKeys];
    for (int64_t i = panel.begin; i < panel.end; ++i) {
        offsets[i - panel.begin] = input.k.offset(b, key_head, order.keys()[i]);
    }
    scores.pack(offsets, panel.end - panel.begin);
}

// Scores of the panel for those of the rows taken that see any of it, a tile of rows after the other; calls use(row,
// scores, begin, end) with the keys of the panel that the row sees.
template <typename Use>
void visit_rows(const AttentionTensors& input, const KeyOrder& order, const Run& panel, const std::vector<Row>& rows,
                Scores& scores, const Use& use) {
    KeyOrder::Range ranges[kMostRows];
    const int64_t all = static_cast<int64_t>(rows.size());
    for (int64_t tile = 0; tile < all; tile += scores.tile_rows()) {
        const int64_t count = std::min(scores.tile_rows(), all - tile);
        bool seen = false;
        for (int64_t r = 0; r < count; ++r) {
            ranges[r] = order.visible(panel, rows[tile + r].position, input.window);
            seen = seen || !ranges[r].empty();
        }
        if (!seen) continue;
        scores.multiply(tile, count);
        for (int64_t r = 0; r < count; ++r) {
            if (ranges[r].empty()) continue;
            use(rows[tile + r], scores.row(r), ranges[r].begin - panel.begin, ranges[r].end - panel.begin);
        }
    }
}

// Masses and log-sum-exp of the queries [first, last) of a response, in the heads that share `key_head`.
void mass_of_rows(const AttentionTensors& input, int64_t b, int64_t key_head, int64_t first, int64_t last,
                  const KeyOrder& order, const std::vector<Run>& panels, float* mass, float* lse) {
    const int64_t segments = input.num_segments;
    std::vector<Row> rows;
    for (int64_t token = first; token < last; ++token) {
        const int64_t position = input.position(b, token);
        for (int64_t head = key_head * input.group(); head < (key_head + 1) * input.group(); ++head) {
            const int64_t index = input.query_index(b, head, token);
            std::fill_n(mass + index * segments, segments, 0.0f);
            lse[index] = -kInfinity;
            if (position >= 0) rows.push_back({token, head, position});
        }
    }
    Scores scores(input);
    take_rows(input, b, rows, scores);
    for (const Run& panel : panels) {
        const bool seen = std::any_of(rows.begin(), rows.end(), [&](const Row& row) {
            return !order.visible(panel, row.position, input.window).empty();
        });
        if (!seen) continue;
        pack_panel(input, b, key_head, order, panel, scores);
        visit_rows(input, order, panel, rows, scores,
                   [&](const Row& row, float* row_scores, int64_t begin, int64_t end) {
                       const int64_t index = input.query_index(b, row.head, row.token);
                       // Until the last panel `lse` holds the largest score and `mass` sums relative to it.
                       kernels().softmax_update(row_scores, begin, end, lse + index, mass + index * segments, segments,
                                                panel.segment);
                   });
    }
    for (const Row& row : rows) {
        const int64_t index = input.query_index(b, row.head, row.token);
        float total = 0.0f;
        for (int64_t g = 0; g < segments; ++g) total += mass[index * segments + g];
        if (total == 0.0f) continue;  // sees no key
        for (int64_t g = 0; g < segments; ++g) mass[index * segments + g] /= total;
        lse[index] += std::log(total);
    }
}

// What the keys of a panel receive from the weighted queries of a response, in the heads that share `key_head`.
void heat_of_panel(const AttentionTensors& input, int64_t b, int64_t key_head, const KeyOrder& order, const Run& panel,
                   const float* weights, const float* lse, float* heat) {
    Scores scores(input);
    pack_panel(input, b, key_head, order, panel, scores);
    std::vector<Row> rows;
    for (int64_t head = key_head * input.group(); head < (key_head + 1) * input.group(); ++head) {
        float totals[kPanelKeys] = {};
        const int64_t tokens = input.q.tokens(b);
        for (int64_t begin_token = 0; begin_token < tokens; begin_token += kItemRows) {
            rows.clear();
            for (int64_t token = begin_token; token < std::min(begin_token + kItemRows, tokens); ++token) {
                if (weights[input.q.first(b) + token] == 0.0f) continue;
                rows.push_back({token, head, input.position(b, token)});
            }
            take_rows(input, b, rows, scores);
            visit_rows(input, order, panel, rows, scores,
                       [&](const Row& row, float* row_scores, int64_t begin, int64_t end) {
                           const int64_t index = input.query_index(b, head, row.token);
                           kernels().add_probabilities(row_scores, begin, end, lse[index],
                                                       weights[input.q.first(b) + row.token], totals);
                       });
        }
        for (int64_t i = panel.begin; i < panel.end; ++i) {
            heat[input.key_index(b, head, order.keys()[i])] = totals[i - panel.begin];
        }
    }
}

// The tokens of one head of a response, a view of [B, H, L, d] or [L, H, d].
at::Tensor head_of(const at::Tensor& tensor, const Heads& layout, int64_t b, int64_t head) {
    if (layout.boundaries == nullptr) return tensor.select(0, b).select(0, head);
    return tensor.narrow(0, layout.boundaries[b], layout.tokens(b)).select(1, head);
}

// Zeros in place of NaN and infinities. A query and a key that do not see each other have a slope of zero, which times
// NaN would be NaN. Where they do, the slope is NaN itself.
at::Tensor finite_part(const at::Tensor& rows) { return at::nan_to_num(rows, 0.0, 0.0, 0.0); }

// Gradients of attention by recomputation, a tile of queries after the other: the scores' gradient is
// p (g - <p, g>), where g is the gradient of the probabilities p. slopes(order, head, token, seen, row) turns the
// probabilities of a row into that, in the runs of keys that the query sees.
template <typename Slopes>
void backward_of_head(const AttentionTensors& input, int64_t b, int64_t key_head, const at::Tensor& q,
                      const at::Tensor& k, const float* lse, const Slopes& slopes, at::Tensor& grad_q,
                      at::Tensor& grad_k) {
    // Worker threads of at::parallel_for do not inherit that autograd is off.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const KeyOrder order(input, b);
    const int64_t tokens = input.q.tokens(b), count = order.count();
    if (tokens == 0 || count == 0) return;
    const at::Tensor chosen = at::tensor(order.keys(), at::kLong);
    const at::Tensor keys = head_of(k, input.k, b, key_head).index_select(0, chosen).to(at::kFloat);
    const at::Tensor finite_keys = finite_part(keys);
    at::Tensor grad_keys = at::zeros_like(keys);
    const int64_t tile = std::clamp<int64_t>(kTileFloats / count, 1, tokens);
    for (int64_t head = key_head * input.group(); head < (key_head + 1) * input.group(); ++head) {
        const at::Tensor all_queries = head_of(q, input.q, b, head);
        at::Tensor grad_queries = head_of(grad_q, input.q, b, head);
        for (int64_t begin = 0; begin < tokens; begin += tile) {
            const int64_t length = std::min(tile, tokens - begin);
            const at::Tensor queries = all_queries.narrow(0, begin, length).to(at::kFloat);
            at::Tensor scores = at::mm(queries, keys.t()).mul_(input.scale);
            float* rows = scores.mutable_data_ptr<float>();
            at::parallel_for(0, length, 8, [&](int64_t first, int64_t last) {
                std::vector<Run> seen;  // of the row's keys, without empty ones
                for (int64_t r = first; r < last; ++r) {
                    float* row = rows + r * count;
                    const int64_t token = begin + r, index = input.query_index(b, head, token);
                    seen.clear();
                    for (const Run& run : order.segments()) {
                        const KeyOrder::Range range = order.visible(run, input.position(b, token), input.window);
                        std::fill(row + run.begin, row + range.begin, 0.0f);
                        kernels().probabilities(row, range.begin, range.end, lse[index]);
                        std::fill(row + range.end, row + run.end, 0.0f);
                        if (!range.empty()) seen.push_back({run.segment, range.begin, range.end});
                    }
                    slopes(order, head, token, seen, row);
                }
            });
            scores.mul_(input.scale);
            grad_queries.narrow(0, begin, length).copy_(at::mm(scores, finite_keys));
            grad_keys.addmm_(scores.t(), finite_part(queries));
        }
    }
    head_of(grad_k, input.k, b, key_head).index_copy_(0, chosen, grad_keys.to(grad_k.scalar_type()));
}

template <typename Slopes>
Tensors backward(const ArgumentReader& reader, const AttentionTensors& input, const float* lse, const Slopes& slopes) {
    const at::Tensor &q = reader.tensor("q"), &k = reader.tensor("k");
    at::Tensor grad_q = at::zeros(q.sizes(), q.options()), grad_k = at::zeros(k.sizes(), k.options());
    const auto item = [&](int64_t index) {
        const int64_t b = index / input.k.heads, key_head = index % input.k.heads;
        backward_of_head(input, b, key_head, q, k, lse, slopes(b), grad_q, grad_k);
    };
    const int64_t items = input.batch * input.k.heads;
    if (items >= at::get_num_threads()) {
        parallel_items(items, item);
    } else {
        for (int64_t index = 0; index < items; ++index) item(index);
    }
    return {grad_q, grad_k};
}

// The mean over heads of [B, Hq, L, ...] or [Hq, L, ...], added up in the order of heads whatever the layout.
at::Tensor mean_of_heads(const AttentionTensors& input, const at::Tensor& by_head) {
    const bool packed = input.packed();
    std::vector<int64_t> shape = by_head.sizes().vec();
    shape.erase(shape.begin() + (packed ? 0 : 1));
    at::Tensor mean = at::empty(shape, by_head.options());
    const int64_t batch = packed ? 1 : input.batch, heads = input.q.heads;
    const int64_t count = by_head.numel() / std::max<int64_t>(batch * heads, 1);  // numbers per head
    const float* from = by_head.const_data_ptr<float>();
    float* to = mean.mutable_data_ptr<float>();
    at::parallel_for(0, batch * count, kItemRows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* first = from + i / count * heads * count + i % count;
            float total = 0.0f;
            for (int64_t head = 0; head < heads; ++head) total += first[head * count];
            to[i] = total / static_cast<float>(heads);
        }
    });
    return mean;
}

}  // namespace

namespace ops {
namespace {

Tensors attention_mass(const ArgumentReader& reader) {
    const auto num_segments = reader.value<int64_t>("num_segments");
    const bool per_head = reader.value<bool>("per_head");
    const AttentionTensors input = reader.attention(num_segments);
    std::vector<int64_t> shape = input.head_shape(input.q);
    at::Tensor lse = at::empty(shape, reader.tensor("q").options().dtype(at::kFloat));
    shape.push_back(num_segments);
    at::Tensor mass = at::empty(shape, lse.options());
    float *mass_data = mass.mutable_data_ptr<float>(), *lse_data = lse.mutable_data_ptr<float>();

    const std::vector<KeyOrder> orders = key_orders(input);
    std::vector<std::vector<Run>> panels;
    std::vector<int64_t> tokens;
    int64_t rows = 0;
    for (int64_t b = 0; b < input.batch; ++b) {
        panels.push_back(panels_of(orders[b]));
        tokens.push_back(input.q.tokens(b));
        rows += tokens[b] * input.q.heads;
    }
    // Rows are independent of each other: how they are cut into items changes no bit.
    const int64_t share = rows / (kItemsPerThread * at::get_num_threads()) + 1;
    const Pieces pieces(tokens, std::max<int64_t>(std::min(share, kItemRows) / input.group(), 1));
    parallel_items(pieces.count() * input.k.heads, [&](int64_t item) {
        const int64_t piece = item / input.k.heads, b = pieces.sequence(piece), begin = pieces.begin(piece, b);
        mass_of_rows(input, b, item % input.k.heads, begin, std::min(begin + pieces.length(), tokens[b]), orders[b],
                     panels[b], mass_data, lse_data);
    });
    if (per_head) return {mass, at::empty({0}, lse.options()), lse};
    return {mean_of_heads(input, mass), mass, lse};
}

Tensors attention_mass_backward(const ArgumentReader& reader) {
    std::vector<int64_t> shape = reader.shape("head_mass").vec();
    TORCH_CHECK_VALUE(!shape.empty(), "head_mass must have shape [..., segments], got ", shape);
    const int64_t segments = shape.back();
    const AttentionTensors input = reader.attention(segments);
    shape = input.head_shape(input.q);
    const float* lse = reader.data<float>("lse", shape);
    shape.push_back(segments);
    const float* masses = reader.data<float>("head_mass", shape);
    const float* grads = reader.data<float>("grad_mass", shape);
    return backward(reader, input, lse, [&](int64_t b) {
        return [&, b](const KeyOrder&, int64_t head, int64_t token, const std::vector<Run>& seen, float* row) {
            const int64_t index = input.query_index(b, head, token) * segments;
            float mean = 0.0f;
            for (const Run& run : seen) mean += masses[index + run.segment] * grads[index + run.segment];
            for (const Run& run : seen) {
                const float slope = grads[index + run.segment] - mean;
                for (int64_t i = run.begin; i < run.end; ++i) row[i] *= slope;
            }
        };
    });
}

Tensors attention_heatmap(const ArgumentReader& reader) {
    const bool per_head = reader.value<bool>("per_head");
    const AttentionTensors input = reader.attention(kLabels);
    const float* lse = reader.data<float>("lse", input.head_shape(input.q));
    const float* weights = reader.data<float>("query_weights", input.token_shape(input.q));
    at::Tensor heat = at::zeros(input.head_shape(input.k), reader.tensor("lse").options());
    float* heat_data = heat.mutable_data_ptr<float>();

    const std::vector<KeyOrder> orders = key_orders(input);
    struct Item {
        int64_t b;
        Run panel;
    };
    std::vector<Item> items;
    for (int64_t b = 0; b < input.batch; ++b) {
        for (const Run& panel : panels_of(orders[b])) {
            if (panel.segment == kShown) items.push_back({b, panel});
        }
    }
    parallel_items(static_cast<int64_t>(items.size()) * input.k.heads, [&](int64_t index) {
        const Item& item = items[index / input.k.heads];
        heat_of_panel(input, item.b, index % input.k.heads, orders[item.b], item.panel, weights, lse, heat_data);
    });
    return {per_head ? heat : mean_of_heads(input, heat)};
}

Tensors attention_heatmap_backward(const ArgumentReader& reader) {
    const AttentionTensors input = reader.attention(kLabels);
    const float* lse = reader.data<float>("lse", input.head_shape(input.q));
    const float* grads = reader.data<float>("grad_heat", input.head_shape(input.k));
    const float* weights = reader.data<float>("query_weights", input.token_shape(input.q));
    return backward(reader, input, lse, [&](int64_t b) {
        return [&, b](const KeyOrder& order, int64_t head, int64_t token, const std::vector<Run>& seen, float* row) {
            const float* grad = grads + input.key_index(b, head, 0);
            const float weight = weights[input.q.first(b) + token];
            if (weight == 0.0f) {  // the query is not read
                for (const Run& run : seen) std::fill(row + run.begin, row + run.end, 0.0f);
                return;
            }
            // A key that is not shown gets no gradient itself, but shares in the denominator.
            double mean = 0.0;
            for (const Run& run : seen) {
                if (run.segment != kShown) continue;
                for (int64_t i = run.begin; i < run.end; ++i) {
                    mean += static_cast<double>(row[i]) * grad[order.keys()[i]];
                }
            }
            for (const Run& run : seen) {
                for (int64_t i = run.begin; i < run.end; ++i) {
                    const float own = run.segment == kShown ? grad[order.keys()[i]] : 0.0f;
                    row[i] *= weight * (own - static_cast<float>(mean));
                }
            }
        };
    });
}

TORCH_LIBRARY_IMPL(vgpo_kernels, CPU, library) {
    library.impl("attention_mass", by_name<attention_mass, Values::kChecked>());
    library.impl("attention_mass_backward", by_name<attention_mass_backward, Values::kChecked>());
    library.impl("attention_heatmap", by_name<attention_heatmap, Values::kChecked>());
    library.impl("attention_heatmap_backward", by_name<attention_heatmap_backward, Values::kChecked>());
}

}  // namespace
}  // namespace ops
}  // namespace vgpo
