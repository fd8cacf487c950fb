// Products of queries with a panel of keys, and the streaming softmax over them. Include after vector_math.h, inside
// the vector's namespace.

// Vectors of keys whose products with kQueryRows queries fill the registers.
constexpr int kStripVectors = kRegisters == 32 ? 4 : 2;
constexpr int kStripKeys = kStripVectors * Vector::kWidth;
static_assert(kPanelKeys % kStripKeys == 0);

// Transposed and widened: component i of key j is panel[i * kPanelKeys + j].
template <typename T>
void pack_keys(const void* keys, const int64_t* offsets, int64_t count, int64_t size, float* panel) {
    float part[Vector::kWidth];
    for (int64_t key = 0; key < count; ++key) {
        const T* from = static_cast<const T*>(keys) + offsets[key];
        for (int64_t i = 0; i < size; i += Vector::kWidth) {
            const int lanes = lanes_of(i, size);
            store(part, load_first(from + i, lanes));
            for (int lane = 0; lane < lanes; ++lane) panel[(i + lane) * kPanelKeys + key] = part[lane];
        }
    }
    for (int64_t i = 0; i < size; ++i) {
        for (int64_t key = count; key < kPanelKeys; ++key) panel[i * kPanelKeys + key] = 0.0f;
    }
}

inline void score_strip(const float* const* queries, const float* panel, int64_t size, Vector scale, float* scores) {
    Vector total[kQueryRows][kStripVectors];
    for (auto& row : total) {
        for (Vector& v : row) v = Vector(0.0f);
    }
    for (int64_t i = 0; i < size; ++i, panel += kPanelKeys) {
        Vector keys[kStripVectors];
        for (int v = 0; v < kStripVectors; ++v) keys[v] = load(panel + v * Vector::kWidth);
        for (int r = 0; r < kQueryRows; ++r) {
            const Vector query(queries[r][i]);
            for (int v = 0; v < kStripVectors; ++v) total[r][v] = multiply_add(query, keys[v], total[r][v]);
        }
    }
    for (int r = 0; r < kQueryRows; ++r) {
        for (int v = 0; v < kStripVectors; ++v) {
            store(scores + r * kPanelKeys + v * Vector::kWidth, scale * total[r][v]);
        }
    }
}

template <typename T>
inline void widen(const T* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += Vector::kWidth) {
        const int lanes = lanes_of(i, size);
        store_first(to + i, load_first(from + i, lanes), lanes);
    }
}
inline const float* in_float(const float* row, int64_t, float*) { return row; }
template <typename T>
inline const float* in_float(const T* row, int64_t size, float* room) {
    widen(row, size, room);
    return room;
}

template <typename T>
void attention_scores(const void* queries, const int64_t* offsets, int64_t rows, const float* panel, int64_t keys,
                      int64_t size, float scale, float* room, float* scores) {
    const float* pointers[kQueryRows];
    for (int64_t r = 0; r < kQueryRows; ++r) {
        // A tile of fewer rows repeats its last one.
        pointers[r] = r < rows ? in_float(static_cast<const T*>(queries) + offsets[r], size, room + r * size)
                               : pointers[r - 1];
    }
    for (int64_t key = 0; key < keys; key += kStripKeys) {
        score_strip(pointers, panel + key, size, Vector(scale), scores + key);
    }
}

template <typename T>
void widen_rows(const void* data, const int64_t* offsets, int64_t count, int64_t size, float* rows) {
    for (int64_t r = 0; r < count; ++r) widen(static_cast<const T*>(data) + offsets[r], size, rows + r * size);
}

// Scores outside [begin, end) become -infinity up to the next whole vector, and take no part in what follows.
inline void hide_outside(float* scores, int64_t begin, int64_t end) {
    for (int64_t key = begin / Vector::kWidth * Vector::kWidth; key < begin; ++key) scores[key] = -INFINITY;
    for (int64_t key = end; key % Vector::kWidth != 0; ++key) scores[key] = -INFINITY;
}

inline void softmax_update(float* scores, int64_t begin, int64_t end, float* largest, float* sums, int64_t segments,
                           int64_t segment) {
    hide_outside(scores, begin, end);
    const int64_t first = begin / Vector::kWidth * Vector::kWidth;
    Vector highest_scores = load(scores + first);
    for (int64_t key = first + Vector::kWidth; key < end; key += Vector::kWidth) {
        highest_scores = maximum(load(scores + key), highest_scores);
    }
    // A new maximum is rare after the first panels.
    if (any(highest_scores > Vector(*largest))) {
        const float raised = highest(highest_scores);
        float shrink[Vector::kWidth];
        store(shrink, exponential(Vector(*largest - raised)));
        for (int64_t g = 0; g < segments; ++g) sums[g] *= shrink[0];
        *largest = raised;
    }
    // Scores may be -infinity, where products leave the range of floats. Then any origin will do.
    const Vector origin(*largest == -INFINITY ? 0.0f : *largest);
    Vector total(0.0f);
    for (int64_t key = first; key < end; key += Vector::kWidth) {
        total = total + exponential(load(scores + key) - origin);
    }
    sums[segment] += sum(total);
}

inline void probabilities(float* scores, int64_t begin, int64_t end, float lse) {
    for (int64_t key = begin; key < end; key += Vector::kWidth) {
        const int lanes = lanes_of(key, end);
        store_first(scores + key, exponential(load_first(scores + key, lanes) - Vector(lse)), lanes);
    }
}

inline void add_probabilities(const float* scores, int64_t begin, int64_t end, float lse, float weight, float* totals) {
    for (int64_t key = begin; key < end; key += Vector::kWidth) {
        const int lanes = lanes_of(key, end);
        const Vector probability = exponential(load_first(scores + key, lanes) - Vector(lse));
        store_first(totals + key, multiply_add(Vector(weight), probability, load_first(totals + key, lanes)), lanes);
    }
}
