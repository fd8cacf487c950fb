// A matrix product of clusters with Hopper's instructions, right and with one planted mistake each: what the harness
// must catch, and must not.
#pragma once

#include <map>
#include <string>

#include "../../csrc/cuda/hopper.cuh"
#include "tensors.h"

namespace {

namespace gpu = vgpo::cuda;

enum class Mistake {
    kNone,
    kEarlyRelease,
    kOwnBlockOnly,
    kTwoArrivals,
    kNoBytes,
    kFewBytes,
    kWrongParity,
    kEarlyRead,
    kNoGroup,
    kNoFence,
    kTouchedSums,
    kThreeWarps,
    kDifferentOperands,
    kUnpublished,
    kNoFirstSync,
    kNoLastSync,
    kNoProductAwaited,
    kNoCopyAwaited,
    kAskewBox,
    kWrongSwizzle,
    kForeignBlock
};

struct BoxArguments {
    CUtensorMap left, right;  // [N, K] and [256, K], bf16
    float* out;               // [N, 256]
    int rows, steps;
};

constexpr int kPlantStages = 2, kPlantRows = gpu::kProductRows, kPlantCluster = 2;
constexpr int kLeftBytes = kPlantRows * gpu::kBoxBytes, kRightBytes = gpu::kProductColumns * gpu::kBoxBytes;
constexpr int kPlantBytes = kPlantStages * (kLeftBytes + kRightBytes), kHalfColumns = gpu::kProductColumns / 2;

// A cluster computes 128 rows at a time, a block 64 of them. Its first warpgroup multiplies, its second one fetches the
// block's rows, and half of the columns for both blocks.
template <Mistake kMistake>
void multiply_boxes(BoxArguments arguments) {
    __shared__ uint64_t full[kPlantStages], empty[kPlantStages];
    EMULATED_DYNAMIC_SHARED(unsigned char, shared);
    unsigned char* boxes = shared + (1024 - gpu::shared_address(shared) % 1024) % 1024;
    const auto left_box = [&](int stage) { return boxes + stage * kLeftBytes; };
    const auto right_box = [&](int stage) { return boxes + kPlantStages * kLeftBytes + stage * kRightBytes; };
    const int rank = gpu::cluster_rank(), thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        for (int i = 0; i < kPlantStages; ++i) {
            gpu::init_barrier(&full[i], 1);
            gpu::init_barrier(&empty[i], kPlantCluster);
        }
        if (kMistake != Mistake::kUnpublished) gpu::publish_barriers();
    }
    if (kMistake == Mistake::kNoFirstSync) __syncthreads();
    else gpu::sync_cluster();

    const int clusters = static_cast<int>(gridDim.x) / kPlantCluster, all = kPlantCluster * kPlantRows;
    int stage = 0;
    unsigned parity = 0;
    const auto next = [&] {
        stage = (stage + 1) % kPlantStages;
        parity ^= stage == 0;
    };
    for (int row = static_cast<int>(blockIdx.x) / kPlantCluster * all; row < arguments.rows; row += clusters * all) {
        if (thread == gpu::kWarpgroupThreads) {
            for (int step = 0; step < arguments.steps; ++step, next()) {
                const int column = step * gpu::kBoxColumns<__nv_bfloat16>;
                const int bytes = kLeftBytes + kRightBytes - (kMistake == Mistake::kFewBytes ? 1024 : 0);
                const auto blocks = static_cast<uint16_t>(kMistake == Mistake::kForeignBlock ? 5 : 3);
                const int askew = kMistake == Mistake::kAskewBox ? gpu::kBoxBytes : 0;
                gpu::wait_for(&empty[stage], parity ^ 1);
                if (kMistake != Mistake::kNoBytes) gpu::expect_bytes(&full[stage], static_cast<unsigned>(bytes));
                gpu::copy_box(left_box(stage) + askew, arguments.left, row + rank * kPlantRows, column, &full[stage]);
                gpu::copy_box_to(blocks, right_box(stage) + rank * kRightBytes / 2, arguments.right,
                                 rank * kHalfColumns, column, &full[stage]);
            }
        }
        if (thread >= gpu::kWarpgroupThreads - (kMistake == Mistake::kThreeWarps ? 32 : 0)) continue;
        float sums[gpu::kProductSums] = {};
        const auto release = [&] {
            if (thread >= kPlantCluster) return;
            if (kMistake == Mistake::kOwnBlockOnly && thread != rank) return;
            for (int i = 0; i < (kMistake == Mistake::kTwoArrivals ? 2 : 1); ++i) {
                gpu::arrive_at(&empty[stage], static_cast<unsigned>(thread));
            }
        };
        for (int step = 0; step < arguments.steps; ++step, next()) {
            if (kMistake != Mistake::kNoCopyAwaited) {
                gpu::wait_for(&full[stage], parity ^ (kMistake == Mistake::kWrongParity ? 1 : 0));
            }
            if (kMistake != Mistake::kNoFence || step == 0) gpu::begin_products();
            uint64_t left = gpu::operand_of(left_box(stage)), right = gpu::operand_of(right_box(stage));
            if (kMistake == Mistake::kDifferentOperands && thread >= 64) left += gpu::kOperandStep;
            if (kMistake == Mistake::kWrongSwizzle) left &= ~(3ull << 62);
            for (int i = 0; i < gpu::kBoxBytes / gpu::kStepBytes; ++i) {
                gpu::multiply_group(sums, left + static_cast<unsigned>(i) * gpu::kOperandStep,
                                    right + static_cast<unsigned>(i) * gpu::kOperandStep, true,
                                    static_cast<const __nv_bfloat16*>(nullptr));
                if (kMistake == Mistake::kTouchedSums) sums[i] *= 2.0f;
            }
            if (kMistake != Mistake::kNoGroup) gpu::end_products();
            if (kMistake == Mistake::kEarlyRelease) release();
            if (kMistake == Mistake::kEarlyRead || kMistake == Mistake::kNoProductAwaited) {
                if (step + 1 == arguments.steps) break;
            }
            gpu::wait_for_products<0>();
            if (kMistake != Mistake::kEarlyRelease) release();
        }
        const int own = row + rank * kPlantRows + thread / 32 * 16 + thread % 32 / 4;
        for (int sum = 0; sum < gpu::kProductSums; ++sum) {
            const int column = sum / 4 * 8 + thread % 4 * 2 + sum % 2;
            arguments.out[(own + sum / 2 % 2 * 8) * gpu::kProductColumns + column] = sums[sum];
        }
        if (kMistake == Mistake::kEarlyRead) {
            gpu::wait_for_products<0>();
            release();
            next();
        }
    }
    if (kMistake != Mistake::kNoLastSync) gpu::sync_cluster();
}

#define PLANT(name, mistake) {name, multiply_boxes<Mistake::mistake>}
const std::map<std::string, void (*)(BoxArguments)> kBoxPlants = {
    PLANT("right", kNone),
    PLANT("box released before its products are waited for", kEarlyRelease),
    PLANT("arrives at the own block only", kOwnBlockOnly),
    PLANT("arrives twice", kTwoArrivals),
    PLANT("bytes are not expected", kNoBytes),
    PLANT("fewer bytes are expected", kFewBytes),
    PLANT("wrong parity", kWrongParity),
    PLANT("sums are read before the wait", kEarlyRead),
    PLANT("no end of the products", kNoGroup),
    PLANT("no begin of the products", kNoFence),
    PLANT("sums are written before the wait", kTouchedSums),
    PLANT("three warps", kThreeWarps),
    PLANT("different operands", kDifferentOperands),
    PLANT("barriers are not published", kUnpublished),
    PLANT("no barrier of the cluster at first", kNoFirstSync),
    PLANT("no barrier of the cluster at last", kNoLastSync),
    PLANT("products are not waited for", kNoProductAwaited),
    PLANT("boxes are not waited for", kNoCopyAwaited),
    PLANT("box askew", kAskewBox),
    PLANT("operand is not swizzled", kWrongSwizzle),
    PLANT("block outside the cluster", kForeignBlock),
};
#undef PLANT

}  // namespace

namespace vgpo::cuda {

inline CUtensorMap plant_map(const at::Tensor& matrix, int rows) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.size(1)), static_cast<cuuint64_t>(matrix.size(0))};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride(0)) * 2};
    const cuuint32_t box[] = {kBoxBytes / 2, static_cast<cuuint32_t>(rows)}, every[] = {1, 1};
    CUtensorMap map;
    const CUresult result = cuTensorMapEncodeTiled(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix.const_data_ptr()), sizes, strides, box,
        every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(result == CUDA_SUCCESS, "the emulated GPU: no map of this matrix");
    return map;
}

// left @ right^T by the kernel of this name; right has 256 rows.
inline at::Tensor run_box_plant(const at::Tensor& left, const at::Tensor& right, const std::string& name) {
    const int64_t rows = left.size(0);
    const at::Tensor out = at::empty({rows, kProductColumns}, left.options().dtype(at::kFloat));
    BoxArguments arguments{plant_map(left, kPlantRows), plant_map(right, kHalfColumns), out.mutable_data_ptr<float>(),
                           static_cast<int>(rows), static_cast<int>(left.size(1)) / kBoxColumns<__nv_bfloat16>};
    void* parameters[] = {&arguments};
    emulation::run_kernel(kBoxPlants.at(name), dim3(kPlantCluster), dim3(2 * kWarpgroupThreads), parameters,
                          kPlantBytes + 1024, false, kPlantCluster);
    return out;
}

}  // namespace vgpo::cuda

TORCH_LIBRARY_FRAGMENT(vgpo_emulated, library) {
    library.def("run_box_plant(Tensor left, Tensor right, str name) -> Tensor");
    library.impl("run_box_plant", c10::DispatchKey::CPU, &vgpo::cuda::run_box_plant);
}
