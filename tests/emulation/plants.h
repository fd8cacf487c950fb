// Kernels with one planted mistake each, and their correct twins, behind a binding: what the harness must catch, and
// must not.
#pragma once

#include <cooperative_groups.h>

#include <map>
#include <string>

#include "../../csrc/cuda/binding.cuh"
#include "tensors.h"

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

void read_unwritten(const float* memory, float* out) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    out[thread] = memory[thread];
}

void write_beside(float* memory, bool past) {
    const unsigned threads = gridDim.x * blockDim.x;
    if (blockIdx.x == 0 && threadIdx.x == 0) memory[past ? static_cast<int64_t>(threads) : -1] = 0.0f;
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

struct PlantArguments {
    const float* in;
    float* out;
    float* scratch;
    int64_t count;  // of each array
};
using PlantKernel = void (*)(PlantArguments);

#define PLANT(name, ...) {name, [](PlantArguments a) { __VA_ARGS__; }}
const std::map<std::string, PlantKernel> kPlants = {
    PLANT("reverse", reverse_block<Plant::kNone>(a.in, a.out)),
    PLANT("missing barrier", reverse_block<Plant::kMissingBarrier>(a.in, a.out)),
    PLANT("read past the end", reverse_block<Plant::kLastRead>(a.in, a.out)),
    PLANT("read before the begin", reverse_block<Plant::kFirstRead>(a.in, a.out)),
    PLANT("index past shared memory", reverse_block<Plant::kSharedIndex>(a.in, a.out)),
    PLANT("write to an input", reverse_block<Plant::kWriteInput>(a.in, a.out)),
    PLANT("misaligned vector", reverse_block<Plant::kMisaligned>(a.in, a.out)),
    PLANT("dynamic", reverse_through_dynamic<false>(a.in, a.out)),
    PLANT("missing barrier, dynamic", reverse_through_dynamic<true>(a.in, a.out)),
    PLANT("dynamic memory too small", reverse_through_dynamic<false>(a.in, a.out)),
    PLANT("asynchronous copies", reverse_through_copies<false>(a.in, a.out)),
    PLANT("missing wait", reverse_through_copies<true>(a.in, a.out)),
    PLANT("misaligned copy", copy_askew(a.in, a.out)),
    PLANT("matrices", matrices<false>(a.in, a.out)),
    PLANT("matrices by half a warp", matrices<true>(a.in, a.out)),
    PLANT("rounds", rounds<false>(a.in, a.out)),
    PLANT("missing barrier between rounds", rounds<true>(a.in, a.out)),
    PLANT("two sums", two_sums<false>(a.in, a.out)),
    PLANT("missing barrier between sums", two_sums<true>(a.in, a.out)),
    PLANT("neighbours", neighbours<false>(a.in, a.out, a.scratch)),
    PLANT("missing grid barrier", neighbours<true>(a.in, a.out, a.scratch)),
    PLANT("grid barrier without cooperation", neighbours<false>(a.in, a.out, a.scratch)),
    PLANT("shared across the grid", shared_across_grid(a.in, a.out)),
    PLANT("unwritten shared memory", read_unwritten_shared(a.in, a.out)),
    PLANT("unwritten output", read_unwritten(a.out, a.out)),
    PLANT("unwritten workspace", read_unwritten(a.scratch, a.out)),
    PLANT("write past an output", write_beside(a.out, true)),
    PLANT("write before an output", write_beside(a.out, false)),
    PLANT("write past an array of the workspace", write_beside(a.scratch, true)),
    PLANT("write before an array of the workspace", write_beside(a.scratch, false)),
    PLANT("divergent barrier", divergent_barrier(a.in, a.out)),
    PLANT("two barriers", two_barriers(a.in, a.out)),
    PLANT("warp operations", warp_operations(a.in, a.out)),
    PLANT("half warps", half_warps<false>(a.in, a.out)),
    PLANT("wrong warp mask", half_warps<true>(a.in, a.out)),
    PLANT("atomics", atomics(a.in, a.out, a.scratch)),
    PLANT("stack overflow", deep_recursion(a.in, a.out, 1000)),
};
#undef PLANT

// The workspace has a second array, into which an overrun of the first could go unseen.
void bind(PlantArguments& arguments, vgpo::cuda::Arena& arena) {
    arguments.scratch = arena.take<float>("scratch", arguments.count);
    arena.take<float>("more scratch", arguments.count);
}

}  // namespace

namespace vgpo::cuda {

// Runs the kernel of this name over blocks of 64 floats.
inline at::Tensor run_plant(const at::Tensor& input, const std::string& name) {
    constexpr unsigned kBlock = 64;
    at::Tensor output = at::empty(input.sizes(), input.options());
    PlantArguments arguments{input.const_data_ptr<float>(), output.mutable_data_ptr<float>(), nullptr,
                             input.numel()};
    const at::Tensor memory = allocate_workspace(arguments, input.device());
    void* parameters[] = {&arguments};
    const size_t shared_bytes = (name == "dynamic memory too small" ? kBlock - 1 : kBlock) * sizeof(float);
    const dim3 grid(static_cast<unsigned>(input.numel()) / kBlock);
    const bool cooperative = name != "grid barrier without cooperation";
    emulation::run_kernel(kPlants.at(name), grid, dim3(kBlock), parameters, shared_bytes, cooperative);
    return output;
}

}  // namespace vgpo::cuda

TORCH_LIBRARY_FRAGMENT(vgpo_emulated, library) {
    library.def("run_plant(Tensor input, str name) -> Tensor");
    library.impl("run_plant", c10::DispatchKey::CPU, &vgpo::cuda::run_plant);
}
