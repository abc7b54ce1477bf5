// Every driver function that heed asks for and fake_driver.cpp does not define: it answers CUDA_ERROR_NOT_SUPPORTED.
#include "cuda/driver.h"

extern "C" int fake_cuda_not_supported() { return 801; }

#define FAKE_WEAK(symbol, member, signature) asm(".weak " symbol "\n.set " symbol ", fake_cuda_not_supported\n");
HEED_CUDA_DRIVER_FUNCTIONS(FAKE_WEAK)
