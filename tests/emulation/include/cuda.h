// Stands in for CUDA's header of this name when kernels are built for emulation.
#pragma once

#include "../tensor_map.h"
