// Warps, blocks and the grid: deterministic reductions, and how work is shared out.
//
// Nothing here depends on how many blocks run or in which order: a reduction combines its values in an order fixed by
// the block's size alone, and an item of work gives the same bits whoever takes it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../layout.h"
#include "../math.h"

namespace vgpo {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

// The shape of every cooperative launch. One block of 512 threads per multiprocessor leaves a thread 128 registers:
// enough to keep eight 16-byte loads on their way, and few blocks make the grid's barriers quick. Kernels without a type
// to be templates over are templates over it: a header may not define an ordinary kernel.
constexpr int kThreads = 512;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ inline int warps_per_block() { return static_cast<int>(blockDim.x) / kWarpSize; }

// Warps of the whole grid. Neighbouring numbers sit on different multiprocessors, so that any run of items, however
// short, spreads over the whole chip.
__device__ inline int grid_warp() { return warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); }
__device__ inline int grid_warps() { return warps_per_block() * static_cast<int>(gridDim.x); }

__device__ inline unsigned char* dynamic_shared_memory() {
#ifdef VGPO_EMULATION
    EMULATED_DYNAMIC_SHARED(unsigned char, memory);
#else
    extern __shared__ __align__(16) unsigned char memory[];
#endif
    return memory;
}

template <typename Integer>
constexpr __host__ __device__ Integer ceil_div(Integer value, Integer divisor) {
    return (value + divisor - 1) / divisor;
}

// ---- reductions -----------------------------------------------------------------------------------------------
//
// A reducible type has `merge(other)`, commutative to the bit, and `identity()`. After a reduction every thread holds
// the result.

template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
    static_assert(sizeof(T) % sizeof(unsigned) == 0, "shuffled in 32-bit words");
    constexpr int kWords = sizeof(T) / sizeof(unsigned);
    unsigned words[kWords];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], lane_mask);
    T other;
    memcpy(&other, words, sizeof(T));
    return other;
}

template <typename T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value.merge(shuffle_xor(value, mask));
    return value;
}

template <typename T>
struct Sum {
    T value;

    __device__ static Sum identity() { return {T(0)}; }
    __device__ void merge(const Sum& other) { value += other.value; }
};

// The smallest and largest of floats. A NaN wins over every number, in either operand.
struct Extremes {
    float low;
    float high;

    __device__ static Extremes identity() { return {INFINITY, -INFINITY}; }
    __device__ static Extremes of(float value) { return {value, value}; }
    __device__ void merge(const Extremes& other) {
        low = low < other.low || low != low ? low : other.low;
        high = high > other.high || high != high ? high : other.high;
    }
};

// Integers, and what orders as they do, take one instruction where others take ten and more. Types made of both have an
// overload of their own, too.
__device__ inline Sum<int> warp_reduce(Sum<int> value) {
    return {static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(value.value)))};
}

__device__ inline int warp_min(int value) {
    constexpr unsigned kSign = 0x80000000u;
    return static_cast<int>(__reduce_min_sync(kAllLanes, static_cast<unsigned>(value) ^ kSign) ^ kSign);
}

// A zero loses its sign.
__device__ inline Extremes warp_reduce(Extremes value) {
    constexpr unsigned kSign = 0x80000000u;
    const unsigned low_key = static_cast<unsigned>(order_key(value.low)) ^ kSign;
    const unsigned high_key = static_cast<unsigned>(order_key(value.high)) ^ kSign;
    // A NaN lies beyond every number on either side.
    const unsigned low = __reduce_min_sync(kAllLanes, value.low != value.low ? 0u : low_key);
    const unsigned high = __reduce_max_sync(kAllLanes, value.high != value.high ? ~0u : high_key);
    return {low == 0u ? NAN : order_key_value(static_cast<int32_t>(low ^ kSign)),
            high == ~0u ? NAN : order_key_value(static_cast<int32_t>(high ^ kSign))};
}

template <typename T>
__device__ T warp_sum(T value) {
    return warp_reduce(Sum<T>{value}).value;
}

template <typename T>
__device__ T block_reduce(T value) {
    __shared__ T partials[kMaxWarps];
    value = warp_reduce(value);
    if (lane_index() == 0) partials[warp_index()] = value;
    __syncthreads();
    value = lane_index() < warps_per_block() ? partials[lane_index()] : T::identity();
    value = warp_reduce(value);
    __syncthreads();  // the next reduction of this type reuses `partials`
    return value;
}

// The same for the first warp alone, which spares the others the second half. Warps that have nothing to bring say so.
// A barrier must lie between two calls with the same type.
template <typename T>
__device__ T reduce_to_first_warp(T value, bool brings = true) {
    __shared__ T partials[kMaxWarps];
    if (brings) value = warp_reduce(value);
    if (lane_index() == 0) partials[warp_index()] = value;
    __syncthreads();
    if (warp_index() > 0) return value;
    return warp_reduce(lane_index() < warps_per_block() ? partials[lane_index()] : T::identity());
}

template <typename T>
__device__ T block_sum(T value) {
    return block_reduce(Sum<T>{value}).value;
}

// The pointer of a lane, to all lanes.
template <typename T>
__device__ T* from_lane(T* pointer, int lane) {
    const auto address = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(pointer));
    return reinterpret_cast<T*>(static_cast<uintptr_t>(__shfl_sync(kAllLanes, address, lane)));
}

template <typename T>
__device__ bool same_in_warp(T* pointer) {
    return __all_sync(kAllLanes, pointer == from_lane(pointer, 0)) != 0;
}

// Sum of the values of all lanes up to and including this one.
__device__ inline int warp_inclusive_sum(int value) {
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
        const int below = __shfl_up_sync(kAllLanes, value, delta);
        if (lane_index() >= delta) value += below;
    }
    return value;
}

// Sum of the values of all threads of the block up to and including this one.
__device__ inline int block_inclusive_sum(int value) {
    __shared__ int totals[kMaxWarps];
    value = warp_inclusive_sum(value);
    if (lane_index() == kWarpSize - 1) totals[warp_index()] = value;
    __syncthreads();
    const int total = lane_index() < warp_index() ? totals[lane_index()] : 0;
    value += warp_sum(total);
    __syncthreads();  // the next call reuses `totals`
    return value;
}

// ---- loops ----------------------------------------------------------------------------------------------------

// Calls use(i, load(i)) for this thread's share of [0, count), in rising order, with several loads on their way at a
// time: a block that goes over a long response alone has nothing else to hide their latency. No condition stands between
// them: instead of what lies beyond the end a thread loads its first value once more, and does not use it.
template <int kInFlight, typename Load, typename Use>
__device__ __forceinline__ void for_each_loaded(int count, Load load, Use use) {
    const int step = static_cast<int>(blockDim.x);
    for (int base = threadIdx.x; base < count; base += kInFlight * step) {
        decltype(load(0)) values[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int index = base + i * step;
            values[i] = load(index < count ? index : base);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (base + i * step < count) use(base + i * step, values[i]);
        }
    }
}

// ---- the grid -------------------------------------------------------------------------------------------------

// Waits for every block of a cooperative launch; what they wrote is visible after it. Out of line, because inlined
// barriers share their set-up and would keep it in registers across every phase.
__device__ __noinline__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// Whether this block is the last of `blocks` to call this, and so sees what the others wrote before they did. `arrived`
// is zero before the first one comes.
__device__ inline bool is_last_block(unsigned* arrived, unsigned blocks) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(arrived, 1u) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// ---- ragged work ----------------------------------------------------------------------------------------------

// Numbers the items of all responses consecutively and finds the response that an item belongs to. Whole warps call it,
// with one item for all lanes; items must be sought in rising order. A warp looks at 31 responses at a time, a lane at
// each: one after the other they would take longer than the work, where a batch is large. Items are counted in 32 bits
// (an item is several rows of a hidden state: two thousand million of them do not fit any device), offsets in 64.
template <typename Size>
class RaggedCursor {
   public:
    // `size(b)` is the number of items of response b.
    __device__ RaggedCursor(int64_t batch, Size size) : batch_(static_cast<int>(batch)), size_(size) {}

    // False when there are fewer items.
    __device__ bool seek(int item) {
        unsigned behind = 0;
        while ((behind = __ballot_sync(kAllLanes, ends_ > item)) == 0) {
            if (window_ + kWindow >= batch_) return false;
            look_at(window_ + kWindow);
        }
        items_before(window_ + __ffs(static_cast<int>(behind)) - 2);
        return true;
    }

    // The number of items of all responses before `response`, which must not fall from call to call.
    __device__ int items_before(int response) {
        while (response >= window_ + kWindow) look_at(window_ + kWindow);
        response_ = response;
        begin_ = __shfl_sync(kAllLanes, ends_, response - window_);
        return begin_;
    }

    __device__ int response() const { return response_; }
    __device__ int begin() const { return begin_; }

   private:
    static constexpr int kWindow = kWarpSize - 1;

    __device__ void look_at(int window) {
        const int response = window + lane_index() - 1, before = __shfl_sync(kAllLanes, ends_, kWindow);
        window_ = window;
        ends_ = warp_inclusive_sum(lane_index() == 0 ? before : response < batch_ ? size_(response) : 0);
    }

    int batch_;
    Size size_;
    int window_ = -kWindow;  // first response of those looked at
    int ends_ = 0;           // of lane i, of all responses before number window_ + i
    int response_ = -1;
    int begin_ = 0;
};

template <typename Size>
__device__ RaggedCursor<Size> ragged_cursor(int64_t batch, Size size) {
    return RaggedCursor<Size>(batch, size);
}

// ---- masks ----------------------------------------------------------------------------------------------------

// Lists the positions of the set entries of mask[begin, end), relative to `begin`, in index[begin...]; returns their
// number to every thread of the block. `off_mask(position)` is called at the others. The order of the list is what
// makes padding, packing and holes invisible to everything after it.
template <typename OffMask>
__device__ int compact_mask(const bool* mask, int64_t begin, int64_t end, int32_t* index, OffMask off_mask) {
    constexpr int kLoads = 16;  // mask bytes in flight per thread
    __shared__ int before[kLoads * kMaxWarps];  // set entries of the chunk before each warp's piece
    __shared__ int chunk_total;
    const int pieces = kLoads * warps_per_block();
    int total = 0;
    const int length = static_cast<int>(end - begin);
    mask += begin;
    index += begin;
    for (int chunk = 0; chunk < length; chunk += kLoads * static_cast<int>(blockDim.x)) {
        const int first = chunk + static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
        bool set[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) set[i] = first + i * step < length && mask[first + i * step];
        unsigned votes[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            votes[i] = __ballot_sync(kAllLanes, set[i]);
            if (lane_index() == 0) before[i * warps_per_block() + warp_index()] = __popc(votes[i]);
        }
        __syncthreads();
        if (warp_index() == 0) {
            int own = 0;  // a lane adds up `kLoads` or fewer pieces, then the warp adds up the lanes
            const int own_first = lane_index() * kLoads;
            for (int i = own_first; i < own_first + kLoads && i < pieces; ++i) own += before[i];
            const int inclusive = warp_inclusive_sum(own);
            if (lane_index() == kWarpSize - 1) chunk_total = inclusive;
            int running = inclusive - own;
            for (int i = own_first; i < own_first + kLoads && i < pieces; ++i) {
                const int count = before[i];
                before[i] = running;
                running += count;
            }
        }
        __syncthreads();
        const unsigned lower_lanes = (1u << lane_index()) - 1;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int position = first + i * step;
            if ((votes[i] >> lane_index() & 1u) != 0) {
                const int rank = before[i * warps_per_block() + warp_index()] + __popc(votes[i] & lower_lanes);
                index[total + rank] = position;
            } else if (position < length) {
                off_mask(begin + position);
            }
        }
        total += chunk_total;
        __syncthreads();  // the next chunk reuses `before`
    }
    return total;
}

}  // namespace cuda
}  // namespace vgpo
