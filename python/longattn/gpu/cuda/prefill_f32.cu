// Attention of many query rows over ranges of keys in float32. Arguments: see ranges.cuh. Grid: blocks of 64 rows, query heads, sequences.

#define PREFILL_F32(D)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(floats::THREADS) prefill_f32_##D(RANGE_ARGUMENTS(float, float)) {                          \
    RangesOf<float, float> made = ranges_of<float, float, floats::ROWS>(RANGE_PASSED);                                               \
    if (made.pattern.first_row >= 0) floats::prefill<D>(made.pattern, made.operands, SCORE_PASSED, scale, blockIdx.z, blockIdx.y); \
  }                                                                                                                                \
  KERNEL(prefill_f32_##D)
PREFILL_F32(64)
PREFILL_F32(128)
PREFILL_F32(256)
