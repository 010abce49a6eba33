// Attention of many query rows over ranges of keys on matrix units. Arguments: see ranges.cuh. Grid: blocks of 16 WARPS rows, query
// heads, sequences.

#define PREFILL(T, D, WARPS)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP) prefill_##T##_##D##_##WARPS(RANGE_ARGUMENTS(T)) {                 \
    RangesOf<T> made = ranges_of<T, WARPS * 16>(RANGE_PASSED);                                                                   \
    if (made.pattern.first_row >= 0) prefill<T, D, WARPS>(made.pattern, made.operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y); \
  }                                                                                                                            \
  KERNEL(prefill_##T##_##D##_##WARPS)
#if SCORE_OPTIONS
#define PREFILL_DIMS(T) PREFILL(T, 64, 4) PREFILL(T, 128, 4) PREFILL(T, 256, 4)
#else
#define PREFILL_DIMS(T) PREFILL(T, 64, 4) PREFILL(T, 64, 8) PREFILL(T, 128, 4) PREFILL(T, 128, 8) PREFILL(T, 256, 4)
#endif
PREFILL_DIMS(f16)
PREFILL_DIMS(bf16)
