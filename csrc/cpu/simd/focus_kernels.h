// Sums of rows, cosines, and the benchmark's read. Include after vector_math.h, inside the vector's namespace.

// Rows are summed in blocks and blocks into a total, so that the rounding error grows with neither alone.
constexpr int64_t kBlockRows = 64;
// Rows read side by side: several streams keep more of the memory system busy than one. Each row's own arithmetic
// has the same order in a group and alone, so grouping does not show in a result.
constexpr int kGroup = 4;

template <typename T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // elements of a cache line

// The rows of a group and those of the next one, which are prefetched meanwhile: the hardware's own prefetcher
// stops at the end of a page, and masks make rows jump.
template <typename T, int R>
struct RowGroup {
    const T* rows[R];
    const T* ahead[R];

    inline RowGroup(const T* hidden, const int64_t* offsets, int64_t row, int64_t count) {
        for (int r = 0; r < R; ++r) {
            rows[r] = hidden + offsets[row + r];
            ahead[r] = row + R + r < count ? hidden + offsets[row + R + r] : rows[r];
        }
    }
    inline void prefetch(int64_t column) const {
        for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + column, 0, 2);
    }
};

// block[c] += the group's rows, one after the other.
template <typename T, int R>
inline void add_group(const RowGroup<T, R>& group, int64_t columns, float* block) {
    int64_t column = 0;
    for (; column + kLine<T> <= columns; column += kLine<T>) {
        group.prefetch(column);
        for (int64_t c = column; c < column + kLine<T>; c += Vector::kWidth) {
            Vector total = load(block + c);
            for (int r = 0; r < R; ++r) total = total + load(group.rows[r] + c);
            store(block + c, total);
        }
    }
    for (; column < columns; column += Vector::kWidth) {
        const int lanes = lanes_of(column, columns);
        Vector total = load_first(block + column, lanes);
        for (int r = 0; r < R; ++r) total = total + load_first(group.rows[r] + column, lanes);
        store_first(block + column, total, lanes);
    }
}

template <typename T>
void sum_rows(const void* hidden, const int64_t* offsets, int64_t rows, int64_t columns, float* block, float* total) {
    const T* base = static_cast<const T*>(hidden);
    for (int64_t column = 0; column < columns; ++column) total[column] = 0.0f;
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
        const int64_t end = begin + kBlockRows < rows ? begin + kBlockRows : rows;
        for (int64_t column = 0; column < columns; ++column) block[column] = 0.0f;
        int64_t row = begin;
        for (; row + kGroup <= end; row += kGroup) {
            add_group(RowGroup<T, kGroup>(base, offsets, row, rows), columns, block);
        }
        for (; row < end; ++row) add_group(RowGroup<T, 1>(base, offsets, row, rows), columns, block);
        for (int64_t column = 0; column < columns; ++column) total[column] += block[column];
    }
}

template <typename T, int R>
inline void group_cosines(const RowGroup<T, R>& group, int64_t columns, const float* prototype, float prototype_norm,
                          float* cos) {
    Vector dot[R], square[R];
    for (int r = 0; r < R; ++r) dot[r] = square[r] = Vector(0.0f);
    int64_t column = 0;
    for (; column + kLine<T> <= columns; column += kLine<T>) {
        group.prefetch(column);
        for (int64_t c = column; c < column + kLine<T>; c += Vector::kWidth) {
            const Vector mean = load(prototype + c);
            for (int r = 0; r < R; ++r) {
                const Vector state = load(group.rows[r] + c);
                dot[r] = multiply_add(state, mean, dot[r]);
                square[r] = multiply_add(state, state, square[r]);
            }
        }
    }
    for (; column < columns; column += Vector::kWidth) {
        const int lanes = lanes_of(column, columns);
        const Vector mean = load_first(prototype + column, lanes);
        for (int r = 0; r < R; ++r) {
            const Vector state = load_first(group.rows[r] + column, lanes);
            dot[r] = multiply_add(state, mean, dot[r]);
            square[r] = multiply_add(state, state, square[r]);
        }
    }
    for (int r = 0; r < R; ++r) cos[r] = cosine(sum(dot[r]), sum(square[r]), prototype_norm);
}

template <typename T>
void cosines(const void* hidden, const int64_t* offsets, int64_t rows, int64_t columns, const float* prototype,
             float prototype_norm, float* cos) {
    const T* base = static_cast<const T*>(hidden);
    int64_t row = 0;
    for (; row + kGroup <= rows; row += kGroup) {
        group_cosines(RowGroup<T, kGroup>(base, offsets, row, rows), columns, prototype, prototype_norm, cos + row);
    }
    for (; row < rows; ++row) {
        group_cosines(RowGroup<T, 1>(base, offsets, row, rows), columns, prototype, prototype_norm, cos + row);
    }
}

inline float norm(const float* values, int64_t length) {
    Vector square(0.0f);
    for (int64_t i = 0; i < length; i += Vector::kWidth) {
        const Vector value = load_first(values + i, lanes_of(i, length));
        square = multiply_add(value, value, square);
    }
    return sqrtf(sum(square));
}

// Reads in `kGroup` streams, as the kernels above do.
inline float read(const float* values, int64_t length) {
    Vector total[kGroup];
    for (int s = 0; s < kGroup; ++s) total[s] = Vector(0.0f);
    const int64_t stream = length / (kGroup * Vector::kWidth) * Vector::kWidth;
    for (int64_t i = 0; i < stream; i += Vector::kWidth) {
        for (int s = 0; s < kGroup; ++s) total[s] = maximum(total[s], load(values + s * stream + i));
    }
    for (int64_t i = kGroup * stream; i < length; i += Vector::kWidth) {
        total[0] = maximum(total[0], load_first(values + i, lanes_of(i, length)));
    }
    return highest(maximum(maximum(total[0], total[1]), maximum(total[2], total[3])));
}
