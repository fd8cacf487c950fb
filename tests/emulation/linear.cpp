// The epilogues of an LM head's products behind C functions that run them on the emulated GPU.
#include <cuda_runtime.h>

#include "../../csrc/cuda/linear_logprob.cuh"
#include "exports.h"
#include "launch.h"

using namespace vgpo;
using namespace vgpo::cuda;

// The arguments of either kernel; linear.py mirrors it field by field.
struct Call {
    int64_t order, seed, dtype;
    int64_t rows, columns, first, stride, statistics_stride, coefficients_stride;
    double factor;
    float* logits;
    const float* bias;
    const int64_t* targets;
    float* statistics;
    const float* coefficients;
};

namespace {

HeadRows rows_of(const Call& call) {
    return {call.logits, call.stride, call.bias, call.targets, call.first, static_cast<int>(call.columns),
            static_cast<float>(call.factor)};
}

template <typename Kernel, typename Arguments>
const char* run(const Call& call, Kernel kernel, const Arguments& arguments) {
    emulation::Launch launch;
    launch.grid.x = static_cast<unsigned>(call.rows);
    launch.block.x = kHeadThreads;
    launch.order = static_cast<emulation::Order>(call.order);
    launch.seed = static_cast<uint64_t>(call.seed);
    return run_launch(launch, kernel, arguments);
}

}  // namespace

extern "C" {

const char* head_statistics(const Call* call) {
    const HeadStatisticsArguments arguments{rows_of(*call), call->statistics, call->statistics_stride};
    return run(*call, head_statistics_kernel<kHeadThreads>, arguments);
}

const char* head_gradient(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        const HeadGradientArguments arguments{rows_of(*call), call->coefficients, call->coefficients_stride};
        return run(*call, head_gradient_kernel<element_of<decltype(type)>>, arguments);
    });
}

}  // extern "C"
