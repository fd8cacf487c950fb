// Stands in for the one header that torch generates in CUDA builds only, so that bindings compile against CPU torch.
#pragma once

#define C10_CUDA_BUILD_SHARED_LIBS
