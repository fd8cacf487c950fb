// Storage types of hidden states, without torch: 16-bit floats are their bits until a register converts them.
#pragma once

#include <cstdint>

namespace vgpo {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

}  // namespace vgpo
