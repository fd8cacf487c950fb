// Sums of rows, cosines, and the benchmark's read. Include after vector_math.h, inside the vector's namespace.

// Rows are summed in blocks and blocks into a total, so that the rounding error grows with neither alone.
constexpr int64_t kBlockRows = 64;
constexpr int kBlockStreams = 8;
constexpr int64_t kPair = 2 * Vector::kWidth;

inline Pair load_pair(const float* from) { return {load(from), load(from + Vector::kWidth)}; }
inline Pair load_pair(const Half* from) { return {load(from), load(from + Vector::kWidth)}; }

// Whether load_pair takes even and odd elements apart. Sums over columns then pair with a prototype arranged alike,
// and sums over rows come out arranged. Columns behind the last whole pair stay in place.
template <typename T>
constexpr bool kTakesApart = false;
template <>
constexpr bool kTakesApart<BFloat16> = true;

template <typename T>
void arrange(const float* values, int64_t columns, float* arranged) {
    const int64_t paired = kTakesApart<T> ? columns / kPair * kPair : 0;
    for (int64_t column = 0; column < paired; column += kPair) {
        for (int lane = 0; lane < Vector::kWidth; ++lane) {
            arranged[column + lane] = values[column + 2 * lane];
            arranged[column + Vector::kWidth + lane] = values[column + 2 * lane + 1];
        }
    }
    for (int64_t column = paired; column < columns; ++column) arranged[column] = values[column];
}

template <typename T>
inline void put_back(const float* arranged, int64_t columns, float* values) {
    const int64_t paired = kTakesApart<T> ? columns / kPair * kPair : 0;
    for (int64_t column = 0; column < paired; column += kPair) {
        for (int lane = 0; lane < Vector::kWidth; ++lane) {
            values[column + 2 * lane] = arranged[column + lane];
            values[column + 2 * lane + 1] = arranged[column + Vector::kWidth + lane];
        }
    }
    for (int64_t column = paired; column < columns; ++column) values[column] = arranged[column];
}

// Rows read side by side: row, row + step, row + 2 * step, ... of a list. Streams that each run through neighbouring
// rows keep more of the memory system busy than one does. The hardware's prefetcher stops at the end of a page, so
// lines are asked for a fixed distance ahead; past the last column they are those of the row below, mostly the next.
template <typename T, int R>
struct Streams {
    static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    static constexpr int64_t kAhead = 8 * kLine;

    const T* rows[R];
    int64_t stride;

    inline Streams(const T* hidden, const int64_t* positions, int64_t row_stride, int64_t step) : stride(row_stride) {
        for (int r = 0; r < R; ++r) rows[r] = hidden + positions[r * step] * stride;
    }
    inline void prefetch(int64_t column, int64_t columns) const {
        if (kPair < kLine && column % kLine != 0) return;
        const int64_t ahead = column + kAhead;
        const int64_t target = ahead < columns ? ahead : ahead - columns + stride;
        for (int r = 0; r < R; ++r) {
            for (int64_t line = 0; line < kPair; line += kLine) __builtin_prefetch(rows[r] + target + line);
        }
    }
};

// What makes unit vectors of the rows of the streams. Every row has the same arithmetic in the same order.
template <typename T, int R>
inline void inverse_norms(const Streams<T, R>& streams, int64_t columns, Vector (&factors)[R]) {
    Vector square[R];
    for (int r = 0; r < R; ++r) square[r] = Vector(0.0f);
    int64_t column = 0;
    for (; column + kPair <= columns; column += kPair) {
        streams.prefetch(column, columns);
        for (int r = 0; r < R; ++r) {
            const Pair states = load_pair(streams.rows[r] + column);
            square[r] = multiply_add(states.first, states.first, square[r]);
            square[r] = multiply_add(states.second, states.second, square[r]);
        }
    }
    for (; column < columns; column += Vector::kWidth) {
        const int lanes = lanes_of(column, columns);
        for (int r = 0; r < R; ++r) {
            const Vector state = load_first(streams.rows[r] + column, lanes);
            square[r] = multiply_add(state, state, square[r]);
        }
    }
    for (int r = 0; r < R; ++r) factors[r] = Vector(inverse_norm(sum(square[r])));
}

// block[c] += the rows of the streams, one after the other; kUnit: as unit vectors, for which they are read from memory
// once and from the cache again.
template <bool kUnit, typename T, int R>
inline void add_rows(const Streams<T, R>& streams, int64_t columns, float* block) {
    Vector factors[R];
    if constexpr (kUnit) inverse_norms(streams, columns, factors);
    const auto added = [&](Vector total, Vector states, int r) {
        if constexpr (kUnit) return multiply_add(states, factors[r], total);
        else return total + states;
    };
    int64_t column = 0;
    for (; column + kPair <= columns; column += kPair) {
        if constexpr (!kUnit) streams.prefetch(column, columns);
        Vector first = load(block + column), second = load(block + column + Vector::kWidth);
        for (int r = 0; r < R; ++r) {
            const Pair states = load_pair(streams.rows[r] + column);
            first = added(first, states.first, r);
            second = added(second, states.second, r);
        }
        store(block + column, first);
        store(block + column + Vector::kWidth, second);
    }
    for (; column < columns; column += Vector::kWidth) {
        const int lanes = lanes_of(column, columns);
        Vector total = load_first(block + column, lanes);
        for (int r = 0; r < R; ++r) total = added(total, load_first(streams.rows[r] + column, lanes), r);
        store_first(block + column, total, lanes);
    }
}

// The order of additions depends on the number of rows alone, and is the same for every instruction set, but for those
// of a row's own squares.
template <typename T, bool kUnit>
void sum_rows(const void* hidden, const int64_t* positions, int64_t rows, int64_t stride, int64_t columns, float* room,
              float* total) {
    const T* base = static_cast<const T*>(hidden);
    float *block = room, *arranged = room + columns;
    for (int64_t column = 0; column < columns; ++column) arranged[column] = 0.0f;
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
        const int64_t end = begin + kBlockRows < rows ? begin + kBlockRows : rows;
        const int64_t step = (end - begin) / kBlockStreams;
        for (int64_t column = 0; column < columns; ++column) block[column] = 0.0f;
        for (int64_t row = begin; row < begin + step; ++row) {
            add_rows<kUnit>(Streams<T, kBlockStreams>(base, positions + row, stride, step), columns, block);
        }
        for (int64_t row = begin + step * kBlockStreams; row < end; ++row) {
            add_rows<kUnit>(Streams<T, 1>(base, positions + row, stride, 1), columns, block);
        }
        for (int64_t column = 0; column < columns; ++column) arranged[column] += block[column];
    }
    put_back<T>(arranged, columns, total);
}

// Every row has the same arithmetic in the same order, in however many streams it is read.
template <typename T, int R>
inline void row_cosines(const Streams<T, R>& streams, int64_t columns, const float* prototype, float prototype_norm,
                        float* cos, int64_t step) {
    Vector dot[R], square[R];
    for (int r = 0; r < R; ++r) dot[r] = square[r] = Vector(0.0f);
    int64_t column = 0;
    for (; column + kPair <= columns; column += kPair) {
        streams.prefetch(column, columns);
        const Vector first = load(prototype + column), second = load(prototype + column + Vector::kWidth);
        for (int r = 0; r < R; ++r) {
            const Pair states = load_pair(streams.rows[r] + column);
            dot[r] = multiply_add(states.first, first, dot[r]);
            square[r] = multiply_add(states.first, states.first, square[r]);
            dot[r] = multiply_add(states.second, second, dot[r]);
            square[r] = multiply_add(states.second, states.second, square[r]);
        }
    }
    for (; column < columns; column += Vector::kWidth) {
        const int lanes = lanes_of(column, columns);
        const Vector mean = load_first(prototype + column, lanes);
        for (int r = 0; r < R; ++r) {
            const Vector state = load_first(streams.rows[r] + column, lanes);
            dot[r] = multiply_add(state, mean, dot[r]);
            square[r] = multiply_add(state, state, square[r]);
        }
    }
    // A loop that compilers unroll. With calls in it they would not, and vectors would lie in memory all the way.
    float dots[R], squares[R];
    for (int r = 0; r < R; ++r) {
        dots[r] = sum(dot[r]);
        squares[r] = sum(square[r]);
    }
    for (int r = 0; r < R; ++r) cos[r * step] = cosine(dots[r], squares[r], prototype_norm);
}

template <typename T>
void cosines(const void* hidden, const int64_t* positions, int64_t rows, int64_t stride, int64_t columns,
             const float* prototype, float prototype_norm, float* cos) {
    const T* base = static_cast<const T*>(hidden);
    const int64_t step = rows / kStreams;
    for (int64_t row = 0; row < step; ++row) {
        const Streams<T, kStreams> streams(base, positions + row, stride, step);
        row_cosines(streams, columns, prototype, prototype_norm, cos + row, step);
    }
    for (int64_t row = step * kStreams; row < rows; ++row) {
        const Streams<T, 1> stream(base, positions + row, stride, 1);
        row_cosines(stream, columns, prototype, prototype_norm, cos + row, 1);
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

// Reads in kStreams streams, as the kernels above do.
inline float read(const float* values, int64_t length) {
    Vector largest[kStreams];
    for (int s = 0; s < kStreams; ++s) largest[s] = Vector(0.0f);
    const int64_t stream = length / (kStreams * Vector::kWidth) * Vector::kWidth;
    for (int64_t i = 0; i < stream; i += Vector::kWidth) {
        for (int s = 0; s < kStreams; ++s) largest[s] = maximum(largest[s], load(values + s * stream + i));
    }
    for (int64_t i = kStreams * stream; i < length; i += Vector::kWidth) {
        largest[0] = maximum(largest[0], load_first(values + i, lanes_of(i, length)));
    }
    for (int s = 1; s < kStreams; ++s) largest[0] = maximum(largest[0], largest[s]);
    return highest(largest[0]);
}
