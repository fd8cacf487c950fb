// Launches of an LM head's tiles: what a copy has to know of a matrix, clusters, and whether all of it is possible.
#include "head_tiles.h"

#ifdef VGPO_HOPPER
#include "binding.cuh"
#include "head_tiles.cuh"
#endif

namespace vgpo {
namespace cuda {

#ifndef VGPO_HOPPER

int64_t tile_workspace_columns(int64_t columns) { return columns; }
bool suits_tiles(const at::Tensor&, const at::Tensor&, bool) { return false; }
void launch_tile_statistics(const at::Tensor&, const at::Tensor&, const HeadStatisticsArguments&) {}
void launch_tile_gradient(const at::Tensor&, const at::Tensor&, const HeadGradientArguments&) {}

#else

namespace {

constexpr int64_t kMostTileRows = 1 << 30, kMostTiles = 1 << 30;

bool allowed() {
    static const bool answer = [] {
        const char* given = std::getenv("VGPO_HEAD_TILES");
        return given == nullptr || std::strcmp(given, "0") != 0;
    }();
    return answer;
}

int64_t row_bytes(const at::Tensor& matrix) { return matrix.stride(0) * matrix.element_size(); }

// Whether copies can fetch boxes of a matrix of 16-bit numbers.
bool suits_copies(const at::Tensor& matrix) {
    return matrix.size(0) > 0 && matrix.size(0) <= kMostTileRows && matrix.size(1) > 0 && matrix.stride(1) == 1 &&
           row_bytes(matrix) > 0 && row_bytes(matrix) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
}

// The driver's function, which no library of the runtime has, so that nothing is linked to the driver.
decltype(&cuTensorMapEncodeTiled) encode_function() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = {};
#if CUDART_VERSION >= 12050
    C10_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    C10_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// What copies have to know of a matrix. Beyond its rows and columns they fill boxes with zeros.
CUtensorMap boxes_of(const at::Tensor& matrix) {
    static const auto encode = encode_function();
    const auto type = matrix.scalar_type() == at::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.size(1)), static_cast<cuuint64_t>(matrix.size(0))};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes(matrix))};
    const cuuint32_t box[] = {kBoxBytes / 2, kBoxRows}, every[] = {1, 1};
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, 2, const_cast<void*>(matrix.const_data_ptr()), sizes, strides, box, every,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result), " for ",
                matrix.sizes(), " with strides ", matrix.strides());
    return map;
}

TileRows tile_rows(const at::Tensor& hidden, const at::Tensor& weight, const HeadRows& rows) {
    TileRows tiles = {};
    tiles.hidden = boxes_of(hidden);
    tiles.weight = boxes_of(weight);
    tiles.rows = static_cast<int>(hidden.size(0));
    tiles.columns = rows.columns;
    tiles.dim = static_cast<int>(hidden.size(1));
    tiles.group = static_cast<int>(std::max<int64_t>(1, kGroupBytes / (kClusterRows * row_bytes(hidden))));
    tiles.targets = rows.targets;
    tiles.first = rows.first;
    tiles.factor = rows.maps.shared.factor;
    return tiles;
}

// Launches as many clusters as have work and fit at once.
template <typename Arguments>
void launch_clusters(void (*kernel)(Arguments), const Arguments& arguments, c10::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    int multiprocessors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index()));
    const int fit = std::max(1, std::min(multiprocessors, most_blocks()) / kClusterBlocks);
    const int clusters = std::min(fit, TileOrder(arguments.rows).count());
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileSharedBytes));
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim = {kClusterBlocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(clusters * kClusterBlocks));
    config.blockDim = dim3(kTileThreads);
    config.dynamicSmemBytes = kTileSharedBytes;
    config.stream = c10::cuda::getCurrentCUDAStream(device.index());
    config.attrs = &together;
    config.numAttrs = 1;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments));
}

template <typename Body>
void by_narrow_type(const at::Tensor& hidden, Body body) {
    if (hidden.scalar_type() == at::kHalf) body(static_cast<__half*>(nullptr));
    else body(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace

int64_t tile_workspace_columns(int64_t columns) {
    return ceil_div<int64_t>(columns, kTileColumns) * static_cast<int64_t>(sizeof(float4) / sizeof(float));
}

bool suits_tiles(const at::Tensor& hidden, const at::Tensor& weight, bool has_bias) {
    const bool narrow = hidden.scalar_type() == at::kHalf || hidden.scalar_type() == at::kBFloat16;
    if (!narrow || has_bias || hidden.dim() != 2 || weight.dim() != 2 || !allowed()) return false;
    if (weight.scalar_type() != hidden.scalar_type() || weight.device() != hidden.device()) return false;
    if (!suits_copies(hidden) || !suits_copies(weight) || !is_hopper(hidden.device())) return false;
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    const int64_t tiles = ceil_div<int64_t>(rows, kClusterRows) * ceil_div<int64_t>(columns, kTileColumns);
    // Of very few columns the workspace would not be narrower than logits, by which head_statistics tells it.
    return tiles <= kMostTiles && tile_workspace_columns(columns) < columns;
}

void launch_tile_statistics(const at::Tensor& hidden, const at::Tensor& weight, const HeadStatisticsArguments& call) {
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(call.rows.products) % sizeof(float4) == 0,
                      "logits as a workspace for tiles must begin at a multiple of ", sizeof(float4), " bytes");
    TileStatisticsArguments arguments = {};
    arguments.rows = tile_rows(hidden, weight, call.rows);
    arguments.parts = reinterpret_cast<float4*>(call.rows.products);
    arguments.at_target = call.statistics + 3 * call.statistics_stride;
    by_narrow_type(hidden, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        launch_clusters(head_tiles_kernel<T, StatisticsEpilogue>, arguments, hidden.device());
    });
    TileMergeArguments merge = {};
    merge.parts = arguments.parts;
    merge.tiles = ceil_div(call.rows.columns, kTileColumns);
    merge.rows = arguments.rows.rows;
    merge.statistics = call.statistics;
    merge.statistics_stride = call.statistics_stride;
    launch_blocks(head_merge_kernel<kMergeWarps>, merge, dim3(static_cast<unsigned>(ceil_div(merge.rows, kWarpSize))),
                  kMergeWarps * kWarpSize, 0, hidden.device());
}

void launch_tile_gradient(const at::Tensor& hidden, const at::Tensor& weight, const HeadGradientArguments& call) {
    TileGradientArguments arguments = {};
    arguments.rows = tile_rows(hidden, weight, call.rows);
    arguments.coefficients = call.coefficients;
    arguments.coefficients_stride = call.coefficients_stride;
    arguments.gradient = call.rows.products;
    arguments.stride = call.rows.stride * static_cast<int64_t>(sizeof(float)) / hidden.element_size();
    arguments.aligned = reinterpret_cast<uintptr_t>(call.rows.products) % 16 == 0 && arguments.stride % 8 == 0;
    by_narrow_type(hidden, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        launch_clusters(head_tiles_kernel<T, GradientEpilogue<T>>, arguments, hidden.device());
    });
}

#endif  // VGPO_HOPPER

}  // namespace cuda
}  // namespace vgpo
