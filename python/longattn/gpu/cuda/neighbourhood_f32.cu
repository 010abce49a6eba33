// Neighbourhood attention in float32. Arguments: see neighbourhood.cuh.

#define NEIGHBOURHOOD_F32(D)                                                                                      \
  extern "C" __global__ void __launch_bounds__(floats::THREADS) neighbourhood_f32_##D(GRID_ARGUMENTS(float)) { \
    GRID_MADE(float)                                                                                              \
    floats::prefill<D>(pattern, operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y);                           \
  }                                                                                                               \
  KERNEL(neighbourhood_f32_##D)
NEIGHBOURHOOD_F32(64)
NEIGHBOURHOOD_F32(128)
NEIGHBOURHOOD_F32(256)
