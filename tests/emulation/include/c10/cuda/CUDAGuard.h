// Stands in for torch's header of this name when bindings are built for emulation.
#pragma once

#include "../../../runtime.h"
