// Attention of many query rows over ranges of keys on matrix units. Arguments: see ranges.cuh. Grid: blocks of ROWS rows, query heads,
// sequences.

#define PREFILL(T, D, ROWS)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS) prefill_##T##_##D##_##ROWS(RANGE_ARGUMENTS(T, T)) {            \
    RangesOf<T, T> made = ranges_of<T, T, ROWS>(RANGE_PASSED);                                                                   \
    if (made.pattern.first_row >= 0)                                                                                             \
      prefill<T, D, ROWS, NumberTiles<T, D>>(made.pattern, made.operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y);        \
  }                                                                                                                            \
  KERNEL(prefill_##T##_##D##_##ROWS)
#if SCORE_OPTIONS
#define PREFILL_DIMS(T) PREFILL(T, 64, 64) PREFILL(T, 128, 64) PREFILL(T, 256, 64)
#else
#define PREFILL_DIMS(T) PREFILL(T, 64, 64) PREFILL(T, 64, 128) PREFILL(T, 128, 64) PREFILL(T, 128, 128) PREFILL(T, 256, 64)
#endif
PREFILL_DIMS(f16)
PREFILL_DIMS(bf16)
