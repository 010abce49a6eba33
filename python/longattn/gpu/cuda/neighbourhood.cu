// Neighbourhood attention on matrix units. Arguments: see neighbourhood.cuh.

#define NEIGHBOURHOOD(T, D)                                                                                    \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS) neighbourhood_##T##_##D##_64(GRID_ARGUMENTS(T)) { \
    GRID_MADE(T)                                                                                               \
    prefill<T, D, 64, NumberTiles<T, D>>(pattern, operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y);      \
  }                                                                                                            \
  KERNEL(neighbourhood_##T##_##D##_64)
#define NEIGHBOURHOOD_DIMS(T) NEIGHBOURHOOD(T, 64) NEIGHBOURHOOD(T, 128) NEIGHBOURHOOD(T, 256)
NEIGHBOURHOOD_DIMS(f16)
NEIGHBOURHOOD_DIMS(bf16)
