// What the libraries of this folder share: a kernel's launch on the emulated GPU, and choosing an element type.
#pragma once

#include <string>
#include <type_traits>

#include "cuda_emulation.h"

// Runs a kernel; returns an empty string, or what went wrong.
template <typename Kernel, typename Arguments>
const char* run_launch(const emulation::Launch& launch, Kernel kernel, const Arguments& arguments) {
    static std::string error;
    error = emulation::launch(launch, [&] { kernel(arguments); });
    return error.c_str();
}

// Calls `body` with a null pointer of the element type that `dtype` numbers.
template <typename Body>
const char* by_dtype(int64_t dtype, Body body) {
    switch (dtype) {
        case 0: return body(static_cast<const float*>(nullptr));
        case 1: return body(static_cast<const __half*>(nullptr));
        default: return body(static_cast<const __nv_bfloat16*>(nullptr));
    }
}

template <typename Pointer>
using element_of = std::remove_const_t<std::remove_pointer_t<Pointer>>;
