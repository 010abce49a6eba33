// Neighbourhood attention on matrix units. Arguments: see neighbourhood.cuh.

#define NEIGHBOURHOOD(T, D)                                                                                    \
  extern "C" __global__ void __launch_bounds__(4 * WARP) neighbourhood_##T##_##D##_4(GRID_ARGUMENTS(T)) { \
    GRID_MADE(T)                                                                                               \
    prefill<T, D, 4>(pattern, operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y);                          \
  }                                                                                                            \
  KERNEL(neighbourhood_##T##_##D##_4)
#define NEIGHBOURHOOD_DIMS(T) NEIGHBOURHOOD(T, 64) NEIGHBOURHOOD(T, 128) NEIGHBOURHOOD(T, 256)
NEIGHBOURHOOD_DIMS(f16)
NEIGHBOURHOOD_DIMS(bf16)
