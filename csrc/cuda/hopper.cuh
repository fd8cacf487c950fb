// Hopper's own instructions (sm_90a): barriers that count bytes, copies of boxes of a matrix, and the matrix products
// of a warpgroup, which take their right operand from shared memory, and the left one from there or from registers.
//
// A box in shared memory is a run of rows of 128 bytes, the bytes of a row swizzled: of its eight 16-byte pieces, piece
// p of row r lies at place p ^ (r % 8). Boxes begin on a multiple of 1,024 bytes.
#pragma once

#include <cuda.h>

#include "mma.cuh"

// Only code for sm_90a has these instructions. Any other architecture gets kernels without a body, never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(VGPO_EMULATION)
#define VGPO_HAS_WARPGROUPS 1
#endif

namespace vgpo {
namespace cuda {

constexpr int kWarpgroupThreads = 128;
constexpr int kBoxBytes = 128;  // of a row of a box
constexpr int kBoxAlignment = 1024;
constexpr int kProductRows = 64, kProductColumns = 256;
constexpr int kProductSums = kProductRows * kProductColumns / kWarpgroupThreads;  // of a thread
constexpr int kNarrowBlocks = 64 / 8;  // of 8 columns, in a product of fewer

template <typename T>
constexpr int kBoxColumns = kBoxBytes / static_cast<int>(sizeof(T));

#ifdef VGPO_HAS_WARPGROUPS

#ifndef VGPO_EMULATION

// ---- barriers in shared memory ---------------------------------------------------------------------------------
//
// A phase of a barrier ends when all arrivals and all bytes that were announced are in. Phases count from zero, and a
// thread waits for the end of one by its parity.

__device__ __forceinline__ void init_barrier(uint64_t* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers known to the other blocks of the cluster and to copies; a barrier of the cluster must follow.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier in the same place of a block of the cluster.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, unsigned block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again_%=;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- copies ----------------------------------------------------------------------------------------------------

// Copies the box of a matrix that begins at (row, column) to this block.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, int row, int column, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Copies it to the same place of every block of the cluster whose bit is set in `blocks`, at whose own barriers the
// bytes count.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, void* to, const CUtensorMap& map, int row, int column,
                                            uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

// ---- products --------------------------------------------------------------------------------------------------

// Registers of each thread of this warpgroup from here on; a multiple of eight.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Lets products see what this thread has put into shared memory by other instructions; a barrier must follow.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` groups of products are on their way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define VGPO_FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define VGPO_SIXTEEN(i) VGPO_FOUR(i), VGPO_FOUR(i + 4), VGPO_FOUR(i + 8), VGPO_FOUR(i + 12)
#define VGPO_PRODUCT(type)                                                                                   \
    asm volatile(                                                                                            \
        "{\n"                                                                                                \
        ".reg .pred add;\n"                                                                                  \
        "setp.ne.b32 add, %130, 0;\n"                                                                        \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                         \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                   \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "       \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "  \
        "%128, %129, add, 1, 1, 0, 0;\n"                                                                     \
        "}"                                                                                                  \
        : VGPO_SIXTEEN(0), VGPO_SIXTEEN(16), VGPO_SIXTEEN(32), VGPO_SIXTEEN(48), VGPO_SIXTEEN(64),           \
          VGPO_SIXTEEN(80), VGPO_SIXTEEN(96), VGPO_SIXTEEN(112)                                              \
        : "l"(left), "l"(right), "r"(static_cast<int>(add)))

// sums (+)= left @ right^T of 64 rows, 256 columns and 16 components. Of the sums, warp w of the warpgroup holds rows
// 16 w to 16 w + 15, as mma.cuh says for each 8 columns.
__device__ __forceinline__ void multiply_group(float (&sums)[kProductSums], uint64_t left, uint64_t right, bool add,
                                               const __nv_bfloat16*) {
    VGPO_PRODUCT("bf16");
}
__device__ __forceinline__ void multiply_group(float (&sums)[kProductSums], uint64_t left, uint64_t right, bool add,
                                               const __half*) {
    VGPO_PRODUCT("f16");
}
#undef VGPO_PRODUCT

#define VGPO_BLOCKS(i) \
    "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3]), "+f"(sums[i + 1][0]), \
        "+f"(sums[i + 1][1]), "+f"(sums[i + 1][2]), "+f"(sums[i + 1][3])
#define VGPO_NARROW_SUMS VGPO_BLOCKS(0), VGPO_BLOCKS(2), VGPO_BLOCKS(4), VGPO_BLOCKS(6)
#define VGPO_NARROW_PRODUCT(type)                                                                           \
    asm volatile(                                                                                           \
        "{\n"                                                                                               \
        ".reg .pred add;\n"                                                                                 \
        "setp.ne.b32 add, %37, 0;\n"                                                                        \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                         \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                 \
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"                                                        \
        "}"                                                                                                 \
        : VGPO_NARROW_SUMS                                                                                  \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(static_cast<int>(add)))

// The same of 64 columns, with the left operand in registers: in each warp, as mma.cuh has it, that of its 16 rows.
// Nobody may change it before the products are waited for.
__device__ __forceinline__ void multiply_group(float (&sums)[kNarrowBlocks][4], const unsigned (&left)[4],
                                               uint64_t right, bool add, const __nv_bfloat16*) {
    VGPO_NARROW_PRODUCT("bf16");
}
__device__ __forceinline__ void multiply_group(float (&sums)[kNarrowBlocks][4], const unsigned (&left)[4],
                                               uint64_t right, bool add, const __half*) {
    VGPO_NARROW_PRODUCT("f16");
}

// Between a wait and the first use of its sums, which the compiler could otherwise move ahead of the wait.
__device__ __forceinline__ void take_sums(float (&sums)[kNarrowBlocks][4]) {
    asm volatile("" : VGPO_NARROW_SUMS::"memory");
}
#undef VGPO_NARROW_PRODUCT
#undef VGPO_NARROW_SUMS
#undef VGPO_BLOCKS
#undef VGPO_SIXTEEN
#undef VGPO_FOUR

#else
using emulation::arrive_at;
using emulation::begin_products;
using emulation::cluster_rank;
using emulation::copy_box;
using emulation::copy_box_to;
using emulation::end_products;
using emulation::expect_bytes;
using emulation::init_barrier;
using emulation::keep_registers;
using emulation::multiply_group;
using emulation::publish_barriers;
using emulation::publish_writes;
using emulation::shared_address;
using emulation::sync_cluster;
using emulation::take_registers;
using emulation::take_sums;
using emulation::wait_for;
using emulation::wait_for_products;
#endif

// The first place in a block's dynamic shared memory where a box may begin: up to kBoxAlignment bytes are lost.
__device__ inline unsigned char* first_box() {
    unsigned char* memory = dynamic_shared_memory();
    return memory + (kBoxAlignment - shared_address(memory) % kBoxAlignment) % kBoxAlignment;
}

// An operand: the matrix of a box from this address on, its groups of eight rows 1,024 bytes apart. The components of the
// next step are kOperandStep further.
constexpr uint64_t kOperandStep = kStepBytes / 16;
__device__ __forceinline__ uint64_t operand_of(const void* box) {
    constexpr uint64_t kSwizzled = 1ull << 62, kGroup = (8ull * kBoxBytes / 16) << 32, kUnused = 1ull << 16;
    return kSwizzled | kGroup | kUnused | (shared_address(box) & 0x3ffffu) / 16;
}

#endif  // VGPO_HAS_WARPGROUPS

}  // namespace cuda
}  // namespace vgpo
