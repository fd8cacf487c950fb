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
    T* take(const char* /*name*/, int64_t count) {
        const size_t offset = bytes_;
        bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
    }

    size_t bytes() const { return bytes_; }

   private:
    static constexpr size_t kAlignment = 256;

    unsigned char* base_;
    size_t bytes_ = 0;
};

}  // namespace cuda
}  // namespace vgpo
