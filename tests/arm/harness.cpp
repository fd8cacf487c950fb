// Runs every entry of the tables of CPU kernels that this processor has, on the same numbers, and prints the results:
// "level entry case type digits", a line for each array, in hexadecimal digits of its bits. test_arm.py compares them.
// Attention scores are also printed as they are in double ("exact"), with how far off the kernels may be ("bound").
// With an argument it prints the names of the levels alone, and which is in use.
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "guarded.h"

#ifdef VGPO_PORTABLE_ALONE
namespace vgpo {
const Kernels* const avx2_kernels = nullptr;
const Kernels* const avx512_kernels = nullptr;
const Kernels* const neon_kernels = nullptr;
const Kernels* const neon_bf16_kernels = nullptr;
}  // namespace vgpo
#endif

using namespace vgpo;

namespace {

constexpr int64_t kLengths[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 100, 1027, 2051};
constexpr const char* kTypeNames[] = {"float", "bfloat16", "half"};

// The bits of numbers; which NaN it is differs from processor to processor. printf would take most of the time.
template <typename Bits, typename F>
void print(const char* level, const std::string& entry, const std::string& name, char type, const F* values,
           int64_t count, Bits nan) {
    std::string line = std::string(level) + ' ' + entry + ' ' + name + ' ' + type + ' ';
    for (int64_t i = 0; i < count; ++i) {
        Bits bits;
        std::memcpy(&bits, values + i, sizeof bits);
        if (values[i] != values[i]) bits = nan;
        for (int shift = 8 * sizeof bits - 4; shift >= 0; shift -= 4) line += "0123456789abcdef"[bits >> shift & 15];
    }
    std::puts(line.c_str());
}
void emit(const char* level, const std::string& entry, const std::string& name, const float* values, int64_t count) {
    print<uint32_t>(level, entry, name, 'f', values, count, 0x7fc00000u);
}
void emit(const char* level, const std::string& entry, const std::string& name, const std::vector<double>& values) {
    print<uint64_t>(level, entry, name, 'd', values.data(), static_cast<int64_t>(values.size()), 0x7ff8000000000000u);
}
void emit(const char* level, const std::string& entry, const std::string& name, const std::vector<float>& values) {
    emit(level, entry, name, values.data(), static_cast<int64_t>(values.size()));
}
void emit_bf16(const char* level, const std::string& entry, const std::string& name, const BFloat16* values,
               int64_t count) {
    std::vector<float> numbers;
    for (int64_t i = 0; i < count; ++i) numbers.push_back(static_cast<float>(wide(values[i])));
    emit(level, entry, name, numbers);
}

std::string label(const char* kind, int64_t a, int64_t b = -1) {
    return std::string(kind) + "-" + std::to_string(a) + (b < 0 ? "" : "-" + std::to_string(b));
}

// Positions of rows, backwards and with a gap, so that no kernel gets by with neighbours.
void scatter(Guarded<int64_t>& positions) {
    for (int64_t r = 0; r < positions.count(); ++r) positions[r] = 2 * (positions.count() - 1 - r);
}

template <typename T>
void hidden_states(const Kernels& table, HiddenType type) {
    const int t = static_cast<int>(type);
    const std::string suffix = std::string("<") + kTypeNames[t] + ">";
    const int64_t shapes[][2] = {{0, 5},   {1, 1},   {3, 3},  {8, 8},     {9, 15},
                                {64, 16}, {65, 33}, {71, 7}, {150, 100}, {9, 1030}};
    for (int kind = 0; kind < 3; ++kind) {
        for (const auto& [rows, columns] : shapes) {
            Random random(static_cast<uint64_t>(1000 * rows + columns));
            const int64_t stride = columns + 3;
            Guarded<T> hidden(rows > 0 ? (2 * rows - 1) * stride - 3 : 0);
            random.fill(hidden, kKinds[kind]);
            Guarded<int64_t> positions(rows);
            scatter(positions);
            Guarded<float> prototype(columns), arranged(columns), room(2 * columns), total(columns), cos(rows);
            random.fill(prototype, Kind::kUsual);
            const std::string name = label(kKindNames[kind], rows, columns);
            table.sum_rows[t](hidden.data(), positions.data(), rows, stride, columns, room.data(), total.data());
            emit(table.name, "sum_rows" + suffix, name, total.data(), columns);
            table.sum_unit_rows[t](hidden.data(), positions.data(), rows, stride, columns, room.data(), total.data());
            emit(table.name, "sum_unit_rows" + suffix, name, total.data(), columns);
            table.arrange[t](prototype.data(), columns, arranged.data());
            emit(table.name, "arrange" + suffix, name, arranged.data(), columns);
            table.cosines[t](hidden.data(), positions.data(), rows, stride, columns, arranged.data(),
                             table.norm(prototype.data(), columns), cos.data());
            emit(table.name, "cosines" + suffix, name, cos.data(), rows);
        }
    }
    // Every 16-bit number, in whole registers and in the last incomplete one.
    if (sizeof(T) != 2) return;
    for (const int64_t first : {0, 1}) {
        const int64_t columns = 65536 - first, position = 0;
        Guarded<T> all(columns);
        for (int64_t i = 0; i < columns; ++i) {
            const uint16_t bits = static_cast<uint16_t>(i + first);
            std::memcpy(all.data() + i, &bits, sizeof bits);
        }
        Guarded<float> room(2 * columns), total(columns);
        table.sum_rows[t](all.data(), &position, 1, columns, columns, room.data(), total.data());
        emit(table.name, "sum_rows" + suffix, label("all", first), total.data(), columns);
    }
}

void simple(const Kernels& table) {
    for (int kind = 0; kind < 3; ++kind) {
        for (const int64_t length : kLengths) {
            Random random(static_cast<uint64_t>(length + 7));
            const std::string name = label(kKindNames[kind], length);
            Guarded<float> values(length), others(length);
            random.fill(values, kKinds[kind]);
            random.fill(others, kKinds[kind]);
            emit(table.name, "norm", name, std::vector<float>{table.norm(values.data(), length)});
            emit(table.name, "read", name, std::vector<float>{table.read(values.data(), length)});
            emit(table.name, "smallest", name, std::vector<float>{table.smallest(values.data(), length)});
            emit(table.name, "all_signals", name, std::vector<float>{float(table.all_signals(values.data(), length))});
            const Extremes range = table.extremes(values.data(), length);
            emit(table.name, "extremes", name,
                 range.finite ? std::vector<float>{range.low, range.high} : std::vector<float>{NAN, NAN});
            const double total = range.finite ? double(table.fixed_total(values.data(), length, kUnitScale)) : NAN;
            emit(table.name, "fixed_total", name, std::vector<double>{total});
            for (const float limit : {20.0f, INFINITY}) {
                const double sum = table.log_ratio_sum(values.data(), others.data(), length, limit);
                emit(table.name, "log_ratio_sum", name + (limit < 99.0f ? "-20" : "-inf"), std::vector<double>{sum});
            }
        }
    }
    // What spoils a signal is found in every lane.
    for (int64_t place = 0; place < 9; ++place) {
        const float broken[] = {NAN, INFINITY, -1025.0f, 1024.0f};
        for (int64_t b = 0; b < 4; ++b) {
            Guarded<float> values(9);
            for (int64_t i = 0; i < 9; ++i) values[i] = i == place ? broken[b] : 0.25f;
            emit(table.name, "all_signals", label("broken", place, b),
                 std::vector<float>{float(table.all_signals(values.data(), 9))});
        }
    }
}

void weights(const Kernels& table) {
    struct Variant {
        Schedule schedule;
        float exponent;
        bool gate, intra;
        Score score;
        Position position;
        Accumulation accumulation;
    };
    const Variant variants[] = {
        {Schedule::kLinear, 2.0f, true, true, Score::kAffine, Position::kOneBased, Accumulation::kCompensated},
        {Schedule::kExponential, 2.0f, true, false, Score::kOffset, Position::kZeroBased, Accumulation::kNormalized},
        {Schedule::kExponential, 1.7f, false, true, Score::kAffine, Position::kOneBased, Accumulation::kMean},
        {Schedule::kStep, 2.0f, true, true, Score::kOffset, Position::kOneBased, Accumulation::kCompensated},
        {Schedule::kLinear, 2.0f, false, true, Score::kOffset, Position::kOneBased, Accumulation::kCompensated},
    };
    for (int v = 0; v < 5; ++v) {
        const Variant& variant = variants[v];
        const bool tiny = v == 4;  // half units of the fixed-point sum, whose rounding then shows
        WeightsConfig config = {};
        config.beta = 0.7f;
        config.tail_ratio = 0.5;
        config.top_ratio = 0.3;
        config.schedule = variant.schedule;
        config.start_ratio = 0.25;
        config.exponent = variant.exponent;
        config.step_ratio = 0.5;
        config.gate = variant.gate;
        config.intra = variant.intra;
        config.inter = true;
        config.score = variant.score;
        config.score_offset = tiny ? 0.0f : -0.125f;
        config.position = variant.position;
        config.accumulation = variant.accumulation;
        config.intra_low = 0.5f;
        config.intra_high = 1.5f;
        config.inter_low = 0.8f;
        config.inter_high = 1.2f;
        config.weight_scale = config.fixed_scale();
        for (const int64_t length : kLengths) {
            for (const int64_t first : {int64_t(0), length / 3}) {
                if (length == 0) continue;
                Random random(static_cast<uint64_t>(length + 31 * first + v));
                Guarded<float> cos(length), w(length), psi(length), factors(length);
                // Ties and their neighbour, zeros of both signs, the largest signal.
                for (int64_t i = 0; i < length; ++i) {
                    const uint32_t drawn = random.next() % 8;
                    if (tiny) {
                        cos[i] = static_cast<float>(2 * drawn + 1) / static_cast<float>(2.0 * config.weight_scale);
                        continue;
                    }
                    const float chosen[] = {0.25f, 0.0f, -0.0f, 0x1.fffffep-3f};
                    cos[i] = drawn < 4 ? chosen[drawn] : 0.9f * random.symmetric();
                }
                if (v == 3) cos[length - 1] = kLargestSignal;
                Guarded<int32_t> keys((length + kKeyPadding - 1) / kKeyPadding * kKeyPadding);
                for (int64_t i = 0; i < length; ++i) w[i] = psi[i] = 0.0f;
                const ResponseWeights result = table.response_weights(cos.data(), first, length, config.score_offset,
                                                                      config, keys.data(), w.data(), psi.data());
                const std::string name = label(("variant" + std::to_string(v)).c_str(), length, first);
                emit(table.name, "response_weights.w", name, w.data(), length);
                emit(table.name, "response_weights.psi", name, psi.data(), length);
                emit(table.name, "response_weights.sums", name,
                     std::vector<double>{result.score, result.cos_sum, double(result.gated), result.early_sum,
                                         result.late_sum});
                table.factors(psi.data(), length, 0.3f * random.symmetric(), config, factors.data());
                emit(table.name, "factors", name, factors.data(), length);
            }
        }
    }
}

void shaping(const Kernels& table) {
    for (int v = 0; v < 4; ++v) {
        ShapingConfig config = {};
        config.log1p = v % 2 == 0;
        config.fusion = v == 3 ? Fusion::kVisual : Fusion::kSoftOr;
        config.fusion_weight = v == 2 ? 0.0f : 0.7f;
        config.times_entropy = v != 1;
        config.range_floor = v == 2 ? 1.5f : 1e-8f;
        config.weight = TokenWeight::kSoftmax;
        config.temperature = 0.4f;
        config.entropy_gate = v == 3 ? 0.0f : 0.5f;
        config.threshold = 0.4f;
        config.boost = 2.0f;
        config.floor = v == 1 ? 0.1f : 0.0f;
        config.conserve = v != 1;
        for (const int64_t length : kLengths) {
            if (length == 0) continue;
            Random random(static_cast<uint64_t>(length + v));
            Guarded<float> visual(length), entropy(length), gap(length), weights(length);
            // Signals of short responses are all equal.
            for (int64_t i = 0; i < length; ++i) {
                visual[i] = length < 4 ? 0.25f : random.symmetric();
                entropy[i] = 2.0f + 2.0f * random.symmetric();
                gap[i] = random.next() % 4 == 0 ? 0.0f : 1.0f + random.symmetric();
            }
            const ResponseSignals signals = {visual.data(),
                                             entropy.data(),
                                             gap.data(),
                                             table.extremes(visual.data(), length),
                                             table.extremes(entropy.data(), length),
                                             table.extremes(gap.data(), length),
                                             length};
            const std::string name = label(("variant" + std::to_string(v)).c_str(), length);
            table.softmax_weights(signals, config, weights.data());
            emit(table.name, "softmax_weights", name, weights.data(), length);
            table.gate_weights(signals, config, weights.data());
            emit(table.name, "gate_weights", name, weights.data(), length);
            table.visual_scores(signals, config, weights.data());
            emit(table.name, "visual_scores", name, weights.data(), length);
        }
    }
}

LossOptions loss_options(LossType type) {
    LossOptions options = {};
    options.loss_type = type;
    options.aggregation = Aggregation::kTokenMean;
    options.epsilon_low = 0.2f;
    options.epsilon_high = 0.28f;
    options.dual_clip = 3.0f;
    options.kl_coef = 0.05f;
    options.kl_estimator = static_cast<KlEstimator>(static_cast<int>(type) % static_cast<int>(KlEstimator::kCount));
    options.entropy_coef = 0.01f;
    options.tau_positive = 1.0f;
    options.tau_negative = 1.05f;
    options.vespo_k_pos = 2.0f;
    options.vespo_lambda_pos = 3.0f;
    options.vespo_k_neg = 3.0f;
    options.vespo_lambda_neg = 2.0f;
    options.ratio_clamp = 20.0f;
    options.cispo_cap = NAN;
    options.kl_bias_correction = type == LossType::kDapo;
    options.importance_cap = 2.0f;
    options.importance_mode = type == LossType::kGrpo ? ImportanceMode::kMask : ImportanceMode::kTruncate;
    return options;
}

void losses(const Kernels& table) {
    for (int type = 0; type < static_cast<int>(LossType::kCount); ++type) {
        for (const int64_t length : kLengths) {
            for (const bool everything : {false, true}) {
                Random random(static_cast<uint64_t>(100 * length + type));
                Guarded<float> logp(length), old_logp(length), ref_logp(length), entropy(length), factors(length);
                Guarded<float> advantages(length), importance(length), gradient(length);
                for (int64_t i = 0; i < length; ++i) {
                    logp[i] = -2.0f - 2.0f * random.symmetric();
                    old_logp[i] = logp[i] + 0.4f * random.symmetric();
                    ref_logp[i] = logp[i] + 0.8f * random.symmetric();
                    entropy[i] = 1.0f + random.symmetric();
                    factors[i] = 1.0f + 0.3f * random.symmetric();
                    advantages[i] = random.next() % 6 == 0 ? 0.0f : 2.0f * random.symmetric();
                    importance[i] = 1.2f + 1.2f * random.symmetric();
                }
                if (everything && length > 8) {
                    logp[length / 2] = -INFINITY;  // a token that the policy forbids
                    old_logp[3] = logp[3] + 40.0f;
                    advantages[5] = NAN;
                    old_logp[6] = logp[6] - 200.0f;
                }
                LossTokens tokens = {};
                tokens.logp = logp.data();
                tokens.old_logp = old_logp.data();
                tokens.advantages = {advantages.data(), true};
                tokens.options = loss_options(static_cast<LossType>(type));
                if (everything) {
                    tokens.ref_logp = ref_logp.data();
                    tokens.entropy = entropy.data();
                    tokens.importance = {importance.data(), true};
                    tokens.factors = factors.data();
                }
                tokens.sequence = {0.05f, 0.9f, 1.1f};
                tokens.scale = length > 0 ? 1.0f / static_cast<float>(length) : 1.0f;
                tokens.length = length;
                LossSums sums;
                table.policy_loss(tokens, gradient.data(), sums);
                const std::string name = label(everything ? "everything" : "plain", type, length);
                emit(table.name, "policy_loss.gradient", name, gradient.data(), length);
                emit(table.name, "policy_loss.sums", name,
                     std::vector<double>{sums.loss, sums.ratio, sums.old_kl, sums.ref_kl, sums.entropy,
                                         sums.factors.origin, sums.factors.sum, sums.factors.squares,
                                         sums.sequence_slope, sums.ratio_min, sums.ratio_max});
                emit(table.name, "policy_loss.counts", name,
                     std::vector<double>{sums.clipped_low, sums.clipped_high, sums.dual_clipped, sums.factors.count,
                                         sums.factor_min, sums.factor_max, double(sums.tokens),
                                         double(sums.nonfinite_advantages)});
            }
        }
    }
}

template <typename T>
void attention(const Kernels& table, HiddenType type) {
    const int t = static_cast<int>(type);
    const std::string entry = std::string("attention_scores<") + kTypeNames[t] + ">";
    const int64_t sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 63, 64, 80, 128, 257};
    const int64_t counts[][2] = {{1, 1}, {6, 64}, {5, 17}, {4, 33}};
    const float scale = 0.125f;
    for (int kind = 0; kind < 3; ++kind) {
        for (const int64_t size : sizes) {
            for (const auto& [rows, keys] : counts) {
                Random random(static_cast<uint64_t>(1000 * size + keys));
                Guarded<T> q(rows * (size + 1)), k(keys * (size + 1));
                random.fill(q, kKinds[kind]);
                random.fill(k, kKinds[kind]);
                Guarded<int64_t> query_offsets(rows), key_offsets(keys);
                for (int64_t r = 0; r < rows; ++r) query_offsets[r] = (rows - 1 - r) * (size + 1) + 1;
                for (int64_t j = 0; j < keys; ++j) key_offsets[j] = (keys - 1 - j) * (size + 1) + 1;
                Guarded<float> panel(size * kPanelKeys), room(size * kQueryRows), scores(kQueryRows * kPanelKeys);
                table.pack_keys[t](k.data(), key_offsets.data(), keys, size, panel.data());
                table.attention_scores[t](q.data(), query_offsets.data(), rows, panel.data(), keys, size, scale,
                                          room.data(), scores.data());
                std::vector<float> found;
                std::vector<double> exact, bound;
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t j = 0; j < keys; ++j) {
                        found.push_back(scores[r * kPanelKeys + j]);
                        double sum = 0.0, magnitudes = 0.0, flushed = 0.0;
                        for (int64_t i = 0; i < size; ++i) {
                            const double a = wide(q[query_offsets[r] + i]), b = wide(k[key_offsets[j] + i]);
                            sum += a * b;
                            magnitudes += std::fabs(a * b);
                            flushed += (std::fabs(a) + std::fabs(b) + 2.0) * 0x1p-126;
                        }
                        exact.push_back(sum * static_cast<double>(scale));
                        // Of the chain of products, and of the product with the scale.
                        const double relative = static_cast<double>(size + 4) * 0x1p-24;
                        bound.push_back(static_cast<double>(scale) * (magnitudes * relative + flushed));
                    }
                }
                const std::string name = label(kKindNames[kind], size, 100 * rows + keys);
                emit(table.name, entry, name, found);
                if (&table == portable_kernels) {
                    emit("exact", entry, name, exact);
                    emit("bound", entry, name, bound);
                }
                // A score is the same whatever stands beside it.
                table.pack_keys[t](k.data(), key_offsets.data() + keys - 1, 1, size, panel.data());
                table.attention_scores[t](q.data(), query_offsets.data() + rows - 1, 1, panel.data(), 1, size, scale,
                                          room.data(), scores.data());
                emit(table.name, entry + ".alone", name, std::vector<float>{scores[0], found.back()});
            }
        }
    }
}

void softmax(const Kernels& table) {
    const int64_t ranges[][2] = {{0, 64}, {0, 1}, {3, 4}, {1, 63}, {5, 17}, {60, 64}, {8, 9}};
    for (int kind = 0; kind < 3; ++kind) {
        for (const auto& [begin, end] : ranges) {
            for (const float start : {-INFINITY, 0.5f, 30.0f}) {
                Random random(static_cast<uint64_t>(100 * begin + end));
                Guarded<float> scores(kPanelKeys), sums(3), totals(end);
                for (int64_t i = 0; i < kPanelKeys; ++i) {
                    const float drawn = random.number(kKinds[kind]);
                    scores[i] = 4.0f * (drawn > 100.0f && drawn < INFINITY ? 25.0f : drawn);
                }
                for (int64_t g = 0; g < 3; ++g) sums[g] = start == -INFINITY ? 0.0f : 0.5f + static_cast<float>(g);
                random.fill(totals, Kind::kUsual);
                const float weight = random.symmetric(), lse = start == -INFINITY ? 1.25f : start;
                const std::string name = label(kKindNames[kind], begin, end) + "-from-" + std::to_string(start);
                table.add_probabilities(scores.data(), begin / 4, end, lse, weight, totals.data());
                emit(table.name, "add_probabilities", name, totals.data(), end);
                float largest = start;
                table.softmax_update(scores.data(), begin, end, &largest, sums.data(), 3, 1);
                emit(table.name, "softmax_update", name, std::vector<float>{largest, sums[0], sums[1], sums[2]});
                Guarded<float> row(end);
                random.fill(row, kKinds[kind]);
                table.probabilities(row.data(), begin, end, lse);
                emit(table.name, "probabilities", name, row.data() + begin, end - begin);
            }
        }
    }
}

void logits(const Kernels& table) {
    const int64_t columns_of[] = {1, 3, 4, 5, 31, 255, 256, 257, 700};
    const LogitMap maps[] = {{1.0f, 0.0f}, {0.5f, 0.0f}, {30.0f, 1.0f / 30.0f}};
    for (int kind = 0; kind < 3; ++kind) {
        for (const int64_t columns : columns_of) {
            for (int m = 0; m < 3; ++m) {
                for (const bool with_bias : {false, true}) {
                    Random random(static_cast<uint64_t>(10 * columns + m));
                    Guarded<float> products(columns), others(columns), bias(columns), gradient(columns);
                    Guarded<BFloat16> narrow(columns), narrow_other(columns);
                    for (int64_t i = 0; i < columns; ++i) {
                        products[i] = 5.0f * random.number(kKinds[kind]);
                        others[i] = kind == 0 && i % 3 == 0 ? products[i] : 5.0f * random.number(kKinds[kind]);
                        bias[i] = i % 11 == 5 ? -INFINITY : random.symmetric();
                    }
                    const float* const offsets = with_bias ? bias.data() : nullptr;
                    const std::string name = label(kKindNames[kind], columns, 10 * m + with_bias);
                    for (int squared = 0; squared < 2; ++squared) {
                        LogitStatistics s;
                        float squares = 0.0f;
                        table.logit_statistics[squared](products.data(), offsets, columns, maps[m], s, &squares);
                        emit(table.name, "logit_statistics", name + (squared ? "-squares" : ""),
                             std::vector<float>{s.maximum, s.total, s.weighted, squares});
                    }
                    const LogitGradient row = {4.0f, 1.5f, 0.75f, -0.25f, -1.0f, columns / 2};
                    table.logit_gradient[0](products.data(), offsets, columns, maps[m], row, gradient.data());
                    emit(table.name, "logit_gradient<float>", name, gradient.data(), columns);
                    table.logit_gradient[1](products.data(), offsets, columns, maps[m], row, narrow.data());
                    emit_bf16(table.name, "logit_gradient<bfloat16>", name, narrow.data(), columns);

                    PairRow pair = {{products.data(), others.data()}, {offsets, offsets}, maps[m], columns / 2};
                    PairStatistics p;
                    table.pair_statistics(pair, columns, p);
                    emit(table.name, "pair_statistics", name,
                         std::vector<float>{p.view[0].maximum, p.view[0].total, p.view[0].weighted, p.view[1].maximum,
                                            p.view[1].total, p.view[1].weighted, p.distance[0], p.distance[1], p.root});
                    const PairNormalisers normalisers = {{9.0f, 8.5f}, {1.0f, 1.5f}};
                    PairShares shares;
                    table.pair_shares(pair, columns, normalisers, 0.4f, shares);
                    emit(table.name, "pair_shares", name,
                         std::vector<float>{shares.js, shares.tv, shares.js_p, shares.sign_p});
                    PairGradient to = {{{0.1f, 0.2f, 0.3f, 0.05f, 0.15f, 0.25f, 0.35f, 0.5f},
                                        {-0.1f, 0.3f, 0.2f, 0.1f, 0.05f, 0.15f, 0.25f, -0.5f}},
                                       {narrow.data(), narrow_other.data()}};
                    table.pair_gradient[1](pair, columns, normalisers, to, 0.4f);
                    emit_bf16(table.name, "pair_gradient<bfloat16>", name + "-own", narrow.data(), columns);
                    emit_bf16(table.name, "pair_gradient<bfloat16>", name + "-other", narrow_other.data(), columns);
                    // In the products' own place.
                    to.out[0] = products.data();
                    to.out[1] = others.data();
                    table.pair_gradient[0](pair, columns, normalisers, to, 0.4f);
                    emit(table.name, "pair_gradient<float>", name + "-own", products.data(), columns);
                    emit(table.name, "pair_gradient<float>", name + "-other", others.data(), columns);
                }
            }
        }
    }
}

}  // namespace

int main(int count, char**) {
    const bool names_alone = count > 1;
    for (const Kernels* const* next = available_kernels(); *next != nullptr; ++next) {
        const Kernels& table = **next;
        if (names_alone) {
            std::puts(table.name);
            continue;
        }
        hidden_states<float>(table, HiddenType::kFloat);
        hidden_states<BFloat16>(table, HiddenType::kBFloat16);
        hidden_states<Half>(table, HiddenType::kHalf);
        simple(table);
        weights(table);
        shaping(table);
        losses(table);
        attention<float>(table, HiddenType::kFloat);
        attention<BFloat16>(table, HiddenType::kBFloat16);
        attention<Half>(table, HiddenType::kHalf);
        softmax(table);
        logits(table);
    }
    if (names_alone) std::printf("in use: %s\n", kernels().name);
    return 0;
}
