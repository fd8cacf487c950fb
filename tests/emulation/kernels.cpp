// Every kernel of csrc/cuda behind a C function that runs it on the emulated GPU: one struct in, an error message out.
#include <cuda_runtime.h>

#include "../../csrc/cuda/vgpo_loss.cuh"
#include "../../csrc/settings.h"
#include "exports.h"
#include "launch.h"

using namespace vgpo;
using namespace vgpo::cuda;

// The arguments of any kernel; harness.py mirrors it field by field. Pointers lead to guarded buffers, or are null.
struct Call {
    int64_t blocks, threads, order, seed, guard, dtype;
    int64_t batch, tokens, rows, dim, batch_stride, row_stride, num_prototypes;
    int64_t advantages_per_token, importance_per_token;
    const int64_t* cu_seqlens;
    const void* hidden;
    const bool* visual_mask;
    const bool* response_mask;
    const float* prototype;
    const int64_t* prototype_index;
    const float* cos;
    const int64_t* group_ids;
    const bool* has_visual;
    const float* score_in;
    const float* logp;
    const float* old_logp;
    const float* advantages;
    const float* factors_in;
    const float* ref_logp;
    const float* entropy;
    const float* importance_weights;
    const float* num_tokens;
    const float* num_sequences;
    const double* config;
    const double* options;
    float* prototypes_out;
    float* cos_out;
    float* factors;
    float* psi;
    float* w;
    float* phi;
    float* score;
    float* loss;
    float* grad_logp;
    float* grad_entropy;
    float* metrics;
};

namespace {

// Gives every array of a workspace a guarded buffer of its own, so that an overrun cannot hide in its neighbour.
class GuardedArena {
   public:
    explicit GuardedArena(emulation::Guard guard) : guard_(guard) {}

    template <typename T>
    T* take(const char* name, int64_t count) {
        buffers_.push_back(
            std::make_unique<emulation::GuardedBuffer>(name, static_cast<size_t>(count) * sizeof(T), guard_));
        return reinterpret_cast<T*>(buffers_.back()->data());
    }

   private:
    emulation::Guard guard_;
    std::vector<std::unique_ptr<emulation::GuardedBuffer>> buffers_;
};

GuardedArena arena_of(const Call& call) { return GuardedArena(static_cast<emulation::Guard>(call.guard)); }

// The harness passes as many numbers as are read; the buffer's guard would catch one more.
template <typename Settings>
Settings settings_of(const double* numbers) {
    SettingsReader reader(numbers, std::numeric_limits<size_t>::max());
    Settings settings = {};
    settings.read(reader);
    return settings;
}

Layout layout_of(const Call& call) {
    return call.cu_seqlens == nullptr ? Layout::padded(call.batch, call.tokens, call.rows)
                                      : Layout::packed(call.cu_seqlens, call.batch, call.tokens);
}

template <typename T>
FocusInput<T> focus_of(const Call& call) {
    const T* hidden = static_cast<const T*>(call.hidden);
    const HiddenStrides strides{call.batch_stride, call.row_stride};
    return {hidden,
            strides,
            static_cast<int>(call.dim),
            rows_are_aligned(hidden, strides, call.dim, call.prototype),
            layout_of(call),
            call.visual_mask,
            call.response_mask,
            call.prototype,
            call.prototype_index,
            call.num_prototypes};
}

LossInput loss_of(const Call& call) {
    return {layout_of(call),
            call.logp,
            call.old_logp,
            {call.advantages, call.advantages_per_token != 0},
            call.response_mask,
            call.ref_logp,
            call.entropy,
            {call.importance_weights, call.importance_per_token != 0},
            call.num_tokens,
            call.num_sequences,
            settings_of<LossOptions>(call.options)};
}

LossOutput output_of(const Call& call) { return {call.loss, call.grad_logp, call.grad_entropy, call.metrics}; }

template <typename Kernel, typename Arguments>
const char* run(const Call& call, Kernel kernel, const Arguments& arguments, bool cooperative = true) {
    emulation::Launch launch;
    launch.grid.x = static_cast<unsigned>(call.blocks);
    launch.block.x = static_cast<unsigned>(call.threads);
    launch.cooperative = cooperative;
    launch.order = static_cast<emulation::Order>(call.order);
    launch.seed = static_cast<uint64_t>(call.seed);
    return run_launch(launch, kernel, arguments);
}

}  // namespace

extern "C" {

const char* visual_prototype(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        GuardedArena arena = arena_of(*call);
        VisualPrototypeArguments<T> arguments{focus_of<T>(*call), {}};
        bind(arguments, arena);
        arguments.workspace.prototypes = call->prototypes_out;
        return run(*call, visual_prototype_kernel<T>, arguments);
    });
}

const char* visual_focus(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        GuardedArena arena = arena_of(*call);
        VisualFocusArguments<T> arguments{focus_of<T>(*call), {}, call->cos_out};
        bind(arguments, arena);
        return run(*call, visual_focus_kernel<T>, arguments);
    });
}

const char* visual_weights(const Call* call) {
    GuardedArena arena = arena_of(*call);
    VisualWeightsArguments arguments{layout_of(*call), call->cos, call->response_mask, call->group_ids,
                                     call->has_visual, settings_of<WeightsConfig>(call->config), {}, {}, call->factors,
                                     call->psi, call->w, call->phi, call->metrics};
    bind(arguments, arena);
    arguments.workspace.scores = call->score;
    return run(*call, visual_weights_kernel<kThreads>, arguments);
}

const char* group_weights(const Call* call) {
    const GroupWeightsArguments arguments{call->score_in, call->group_ids, call->has_visual,
                                          call->batch, settings_of<WeightsConfig>(call->config), call->phi};
    return run(*call, group_weights_kernel<kThreads>, arguments, false);
}

const char* policy_loss(const Call* call) {
    GuardedArena arena = arena_of(*call);
    PolicyLossArguments arguments{loss_of(*call), call->factors_in, {}, {}, output_of(*call)};
    bind(arguments, arena);
    return run(*call, policy_loss_kernel<kThreads>, arguments);
}

const char* vgpo_loss(const Call* call) {
    return by_dtype(call->dtype, [&](auto* type) {
        using T = element_of<decltype(type)>;
        GuardedArena arena = arena_of(*call);
        VgpoLossArguments<T> arguments{focus_of<T>(*call), loss_of(*call), call->group_ids,
                                       settings_of<WeightsConfig>(call->config), {}, {}, {}, nullptr, output_of(*call)};
        bind(arguments, arena);
        return run(*call, vgpo_loss_kernel<T>, arguments);
    });
}

}  // extern "C"
