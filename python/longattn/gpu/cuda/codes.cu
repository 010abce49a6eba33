// Rows as 8-bit codes with a scale and an offset each: x = offset + scale * code, offset the smallest number of the row.

constexpr int CODES_THREADS = 256;

// x [B, H, n, D] by strides, codes [B, H, n, D], parameters [B, H, n, 2]: scale and offset. A warp a row. Grid: rows / 8, heads, batch.
template <class T>
DEVICE void encode(const T* x, u8* codes, float* parameters, Strides by, int rows, int dim) {
  int lane = threadIdx.x % WARP, row = blockIdx.x * (CODES_THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  const T* from = x + blockIdx.z * by.batch + blockIdx.y * by.head + row * by.row;
  i64 at = (static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y) * rows + row;
  float low = infinity(), high = -infinity();
  bool finite = true;
  for (int d = lane; d < dim; d += WARP) {
    float number = to_float(from[d]);
    low = fminf(low, number);
    high = fmaxf(high, number);
    finite = finite && fabsf(number) < infinity();
  }
  low = -lanes_max<WARP>(-low);
  high = lanes_max<WARP>(high);
  finite = __all_sync(ALL_LANES, finite);
  // A range may be more than a float holds; half of it is not.
  float half = high - low < infinity() ? 1.f : 0.5f, scale = (high * half - low * half) / (255.f * half);
  if (!finite) {
    scale = 0.f;
    low = __int_as_float(0x7fc00000);  // the row becomes NaN
  }
  float inverse = scale > 0.f ? 1.f / (scale * half) : 0.f;
  if (!(inverse < infinity())) inverse = 0.f;
  for (int d = lane; d < dim; d += WARP) {
    float code = (to_float(from[d]) * half - low * half) * inverse + 0.5f;
    codes[at * dim + d] = static_cast<u8>(code > 0.f ? fminf(code, 255.f) : 0.f);
  }
  if (lane < 2) parameters[2 * at + lane] = lane ? low : scale;
}

#define CODES_ENCODE(T, NAME)                                                                                                \
  extern "C" __global__ void __launch_bounds__(CODES_THREADS) codes_encode_##NAME(                                           \
      const T* x, u8* codes, float* parameters, i64 by_batch, i64 by_head, i64 by_row, int rows, int dim) { \
    encode<T>(x, codes, parameters, {by_batch, by_head, by_row}, rows, dim);                                                 \
  }                                                                                                                          \
  KERNEL(codes_encode_##NAME)
CODES_ENCODE(float, f32)
CODES_ENCODE(f16, f16)
CODES_ENCODE(bf16, bf16)
