// Guarded buffers for Python, the same in every library of this folder.
#pragma once

#include "guard.h"

extern "C" {

void* buffer_new(const char* name, int64_t bytes, int64_t guard) {
    return new emulation::GuardedBuffer(name, static_cast<size_t>(bytes), static_cast<emulation::Guard>(guard));
}

void* buffer_data(void* buffer) { return static_cast<emulation::GuardedBuffer*>(buffer)->data(); }

void buffer_protect(void* buffer) { static_cast<emulation::GuardedBuffer*>(buffer)->protect(); }

void buffer_delete(void* buffer) { delete static_cast<emulation::GuardedBuffer*>(buffer); }

}  // extern "C"
