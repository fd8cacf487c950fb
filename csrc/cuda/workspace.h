// One allocation, many arrays: the workspace of a launch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vgpo {
namespace cuda {

// Hands out arrays from an allocation in order. Over a null base it only counts: bind a workspace once to learn its
// size, allocate, and bind it again.
class Arena {
   public:
    explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}

    template <typename T>
    T* take([[maybe_unused]] const char* name, int64_t count) {
        const size_t offset = bytes_, bytes = static_cast<size_t>(count) * sizeof(T);
        bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
        if (base_ == nullptr) return nullptr;
#ifdef VGPO_EMULATION
        // There an array may get memory of its own, so that an overrun cannot hide in its neighbour.
        if (void* apart = emulation::take_apart(name, bytes)) return static_cast<T*>(apart);
#endif
        return reinterpret_cast<T*>(base_ + offset);
    }

    size_t bytes() const { return bytes_; }

   private:
    static constexpr size_t kAlignment = 256;

    unsigned char* base_;
    size_t bytes_ = 0;
};

}  // namespace cuda
}  // namespace vgpo
