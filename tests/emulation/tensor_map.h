// What <cuda.h> has for copies of boxes of a matrix, of two dimensions: the driver's checks, and its result.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// A matrix of 16-bit numbers. Along dimension 0 they are neighbours.
struct alignas(64) CUtensorMap {
    uint64_t known;  // kKnown where cuTensorMapEncodeTiled has written it
    const unsigned char* address;
    uint64_t sizes[2];
    uint64_t stride;  // of dimension 1, in bytes
    uint32_t box[2];

    static constexpr uint64_t kKnown = 0x7465736e6f72u;
    static constexpr uint64_t kElementBytes = 2;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    constexpr uint64_t kMostElements = 1ull << 32, kMostStride = 1ull << 40, kMostOfBox = 256, kSwizzledBytes = 128;
    const uint64_t row_bytes = box[0] * CUtensorMap::kElementBytes;
    bool valid = rank == 2 && reinterpret_cast<uintptr_t>(map) % 64 == 0;
    valid = valid && reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0 && strides[0] < kMostStride;
    valid = valid && row_bytes % 16 == 0 && row_bytes <= kSwizzledBytes;
    for (int i = 0; i < 2; ++i) {
        valid = valid && sizes[i] > 0 && sizes[i] <= kMostElements && steps[i] == 1;
        valid = valid && box[i] > 0 && box[i] <= kMostOfBox;
    }
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    *map = {CUtensorMap::kKnown, static_cast<const unsigned char*>(address), {sizes[0], sizes[1]}, strides[0],
            {box[0], box[1]}};
    return CUDA_SUCCESS;
}
