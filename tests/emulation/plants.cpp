// Kernels with one planted mistake each, and their correct twins: what the harness must catch, and must not.
#include <cuda_runtime.h>

#include <cooperative_groups.h>

#include "exports.h"

namespace {

// Each kernel reverses in[0, threads) of its block, or computes something as checkable, through what it exercises.

enum class Plant { kNone, kMissingBarrier, kLastRead, kFirstRead, kSharedIndex, kWriteInput, kMisaligned };

template <Plant kPlant>
void reverse_block(const float* in, float* out) {
    __shared__ float tile[64];
    const int thread = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
    const int base = static_cast<int>(blockIdx.x * blockDim.x);
    int read = base + thread;
    if (kPlant == Plant::kLastRead && thread == last) read += 1;
    if (kPlant == Plant::kFirstRead && thread == 0) read -= 1;
    tile[kPlant == Plant::kSharedIndex ? thread + 1 : thread] = in[read];
    if (kPlant != Plant::kMissingBarrier) __syncthreads();
    out[base + thread] = tile[last - thread];
    if (kPlant == Plant::kWriteInput && thread == 0) const_cast<float*>(in)[base] = 0.0f;
    if (kPlant == Plant::kMisaligned && thread == 0) {
        out[base] = reinterpret_cast<const float4*>(in + 1)->x;
    }
}

template <bool kMissingBarrier>
void reverse_through_dynamic(const float* in, float* out) {
    EMULATED_DYNAMIC_SHARED(float, tile);
    const int thread = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
    const int base = static_cast<int>(blockIdx.x * blockDim.x);
    tile[thread] = in[base + thread];
    if (!kMissingBarrier) __syncthreads();
    out[base + thread] = tile[last - thread];
}

template <bool kMissingWait>
void reverse_through_copies(const float* in, float* out) {
    __shared__ float tile[64];
    const int thread = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
    const int base = static_cast<int>(blockIdx.x * blockDim.x);
    __pipeline_memcpy_async(&tile[thread], in + base + thread, sizeof(float));
    __pipeline_commit();
    if (!kMissingWait) __pipeline_wait_prior(0);
    __syncthreads();
    out[base + thread] = tile[last - thread];
}

void copy_askew(const float* in, float*) {
    __shared__ float4 tile;
    if (threadIdx.x == 0) __pipeline_memcpy_async(&tile, in + 1, sizeof tile);
}

// Rows 0 to 7 of four matrices that are all the same, by all lanes of a warp or by half of them.
template <bool kHalf>
void matrices(const float* in, float* out) {
    __shared__ float4 rows[2][8];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    reinterpret_cast<float*>(rows[warp])[lane] = in[blockIdx.x * blockDim.x + threadIdx.x];
    __syncwarp();
    unsigned words[4] = {};
    if (!kHalf || lane < 16) emulation::load_matrices(words, &rows[warp][lane % 8]);
    const bool same = words[0] == words[1] && words[0] == words[2] && words[0] == words[3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = same ? __uint_as_float(words[0]) : -1.0f;
}

// Rounds of writing and reading the same tile: without the second barrier a fast thread overwrites what another has
// yet to read.
template <bool kMissingSecondBarrier>
void rounds(const float* in, float* out) {
    __shared__ float tile[64];
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float sum = 0.0f;
    for (int round = 0; round < 3; ++round) {
        tile[thread] = in[blockIdx.x * blockDim.x + threadIdx.x] + static_cast<float>(round);
        __syncthreads();
        sum += tile[(thread + 1) % threads];
        if (!kMissingSecondBarrier) __syncthreads();
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Two sums over the block through the same scratch: without the barrier in between, a warp that runs ahead overwrites
// what another has yet to read. Only a schedule that lets a warp run ahead through its shuffles shows it.
template <bool kMissingBarrier>
void two_sums(const float* in, float* out) {
    __shared__ float partials[2];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float result = 0.0f;
    for (int round = 0; round < 2; ++round) {
        float sum = in[blockIdx.x * blockDim.x + threadIdx.x] + static_cast<float>(round);
        for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (lane == 0) partials[warp] = sum;
        __syncthreads();
        sum = lane < 2 ? partials[lane] : 0.0f;
        for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (!kMissingBarrier) __syncthreads();
        result += sum;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = result;
}

// Every block writes, then reads what its neighbour wrote.
template <bool kMissingBarrier>
void neighbours(const float* in, float* out, float* exchange) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    exchange[thread] = in[thread];
    if (!kMissingBarrier) cooperative_groups::this_grid().sync();
    out[thread] = exchange[(thread + blockDim.x) % threads];
}

// A tile in shared memory must survive a grid barrier during which other blocks run.
void shared_across_grid(const float* in, float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
    cooperative_groups::this_grid().sync();
    out[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

void read_unwritten_shared(const float* in, float* out) {
    __shared__ float tile[64];
    if (in[0] < 0.0f) tile[threadIdx.x] = in[0];  // never, but the compiler cannot know
    out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x];
}

void divergent_barrier(const float*, float* out) {
    if (threadIdx.x == 0) return;
    __syncthreads();
    out[threadIdx.x] = 0.0f;
}

void two_barriers(const float*, float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 0.0f;
}

// The sum over a warp, and what its vote, shuffles and scan say, all in one number.
void warp_operations(const float* in, float* out) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    float sum = in[thread];
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    const unsigned odd = __ballot_sync(0xffffffffu, lane % 2 == 1);
    const double first = __shfl_sync(0xffffffffu, static_cast<double>(in[thread]), 0);
    int rank = 1;
    for (unsigned delta = 1; delta < 32; delta *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, rank, delta);
        if (lane >= delta) rank += below;
    }
    const int next = __shfl_down_sync(0xffffffffu, static_cast<int>(lane), 1);
    const bool all = __all_sync(0xffffffffu, rank > 0), any = __any_sync(0xffffffffu, lane == 40);
    const bool right = odd == 0xaaaaaaaau && rank == static_cast<int>(lane) + 1 && all && !any &&
                       next == static_cast<int>(lane == 31 ? 31 : lane + 1);
    out[thread] = right ? sum + static_cast<float>(first) : -1.0f;
}

// Halves of a warp on separate paths, each with its own mask.
template <bool kWrongMask>
void half_warps(const float* in, float* out) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    float value = in[thread];
    if (lane < 16) {
        value += __shfl_xor_sync(kWrongMask ? 0xffffffffu : 0x0000ffffu, value, 1);
    } else {
        value -= __shfl_xor_sync(kWrongMask ? 0xffffffffu : 0xffff0000u, value, 1);
    }
    out[thread] = value;
}

void atomics(const float* in, float* out, float* scratch) {
    auto* counters = reinterpret_cast<int*>(scratch);  // poisoned: all -1
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&counters[0], 2);
    atomicMax(&counters[1], static_cast<int>(in[thread]));
    cooperative_groups::this_grid().sync();
    out[thread] = static_cast<float>(counters[0]) + 1000.0f * static_cast<float>(counters[1]);
}

void deep_recursion(const float* in, float* out, int depth) {
    volatile float frame[256];
    frame[depth % 256] = in[0];
    if (depth > 0) deep_recursion(in, out, depth - 1);
    out[threadIdx.x] = frame[depth % 256];
}

}  // namespace

extern "C" {

// Runs the kernel `name` over blocks * 64 floats; returns what the harness has to say.
const char* run_plant(const char* name, const float* in, float* out, float* scratch, int64_t blocks, int64_t order,
                      int64_t seed) {
    static std::string error;
    const std::string wanted = name;
    emulation::Launch launch;
    launch.grid.x = static_cast<unsigned>(blocks);
    launch.block.x = 64;
    launch.dynamic_shared_bytes = 64 * sizeof(float);
    launch.cooperative = true;
    launch.order = static_cast<emulation::Order>(order);
    launch.seed = static_cast<uint64_t>(seed);
    std::function<void()> kernel;
    if (wanted == "reverse") kernel = [=] { reverse_block<Plant::kNone>(in, out); };
    if (wanted == "missing barrier") kernel = [=] { reverse_block<Plant::kMissingBarrier>(in, out); };
    if (wanted == "read past the end") kernel = [=] { reverse_block<Plant::kLastRead>(in, out); };
    if (wanted == "read before the begin") kernel = [=] { reverse_block<Plant::kFirstRead>(in, out); };
    if (wanted == "index past shared memory") kernel = [=] { reverse_block<Plant::kSharedIndex>(in, out); };
    if (wanted == "write to an input") kernel = [=] { reverse_block<Plant::kWriteInput>(in, out); };
    if (wanted == "misaligned vector") kernel = [=] { reverse_block<Plant::kMisaligned>(in, out); };
    if (wanted == "dynamic") kernel = [=] { reverse_through_dynamic<false>(in, out); };
    if (wanted == "missing barrier, dynamic") kernel = [=] { reverse_through_dynamic<true>(in, out); };
    if (wanted == "asynchronous copies") kernel = [=] { reverse_through_copies<false>(in, out); };
    if (wanted == "missing wait") kernel = [=] { reverse_through_copies<true>(in, out); };
    if (wanted == "misaligned copy") kernel = [=] { copy_askew(in, out); };
    if (wanted == "matrices") kernel = [=] { matrices<false>(in, out); };
    if (wanted == "matrices by half a warp") kernel = [=] { matrices<true>(in, out); };
    if (wanted == "dynamic memory too small") {
        launch.dynamic_shared_bytes -= sizeof(float);
        kernel = [=] { reverse_through_dynamic<false>(in, out); };
    }
    if (wanted == "rounds") kernel = [=] { rounds<false>(in, out); };
    if (wanted == "missing barrier between rounds") kernel = [=] { rounds<true>(in, out); };
    if (wanted == "two sums") kernel = [=] { two_sums<false>(in, out); };
    if (wanted == "missing barrier between sums") kernel = [=] { two_sums<true>(in, out); };
    if (wanted == "neighbours") kernel = [=] { neighbours<false>(in, out, scratch); };
    if (wanted == "missing grid barrier") kernel = [=] { neighbours<true>(in, out, scratch); };
    if (wanted == "grid barrier without cooperation") {
        launch.cooperative = false;
        kernel = [=] { neighbours<false>(in, out, scratch); };
    }
    if (wanted == "shared across the grid") kernel = [=] { shared_across_grid(in, out); };
    if (wanted == "unwritten shared memory") kernel = [=] { read_unwritten_shared(in, out); };
    if (wanted == "divergent barrier") kernel = [=] { divergent_barrier(in, out); };
    if (wanted == "two barriers") kernel = [=] { two_barriers(in, out); };
    if (wanted == "warp operations") kernel = [=] { warp_operations(in, out); };
    if (wanted == "half warps") kernel = [=] { half_warps<false>(in, out); };
    if (wanted == "wrong warp mask") kernel = [=] { half_warps<true>(in, out); };
    if (wanted == "atomics") kernel = [=] { atomics(in, out, scratch); };
    if (wanted == "stack overflow") kernel = [=] { deep_recursion(in, out, 1000); };
    error = kernel == nullptr ? "no kernel of this name" : emulation::launch(launch, kernel);
    return error.c_str();
}

}  // extern "C"
