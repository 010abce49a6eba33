// Codes of 4 bits per dimension of keys (RaBitQ), in the format of longattn.index.Signatures: making them, and scanning them.
//
// A key, less the head's mean key and rotated, becomes the point y of a grid that is nearest in angle, and a factor f = |x|^2 / <y, x>
// that makes f <q, y> an unbiased estimate of <q, x>. A block of 16 keys: D / 8 groups of 64 bytes, then 16 factors in f16; byte
// 4 key + t of group g holds dimension 8 g + t in its low half, 8 g + 4 + t in its high half.

constexpr int SIGN_THREADS = 256, SIGN_BLOCK = 16, SIGN_QUERIES = 8, SIGN_BINS = 2048;

// ---- the mean key ----
// Sums of the rows of each block of rows, [B, H, blocks, D]. Grid: blocks, heads, batch; a thread a channel.
template <class T>
DEVICE void sums_of_rows(const T* x, float* sums, Strides by, int rows, int dim) {
  const T* from = x + blockIdx.z * by.batch + blockIdx.y * by.head;
  int first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows), d = threadIdx.x;
  float sum = 0.f;
  for (int row = first; row < end; row++) sum += to_float(from[row * by.row + d]);
  sums[((static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * dim + d] = sum;
}
// centre [heads, D]. Grid: heads of all batches.
DEVICE void mean_of_sums(const float* sums, float* centre, int blocks, int rows, int dim) {
  float sum = 0.f;
  for (int b = 0; b < blocks; b++) sum += sums[(static_cast<i64>(blockIdx.x) * blocks + b) * dim + threadIdx.x];
  centre[static_cast<i64>(blockIdx.x) * dim + threadIdx.x] = sum / rows;
}

// ---- codes ----
// x [B, H, n, D] by strides, centre [B, H, D], turned [D, D]: the rotation's transpose. codes [B, H, blocks, 8 D + 32].
// Grid: blocks of 16 keys, heads, batch; 128 threads.
template <class T, int DIM>
DEVICE void encode(const T* x, const float* centre, const float* turned, u8* codes, Strides by) {
  constexpr int THREADS = 128, MINE = DIM / WARP, ACROSS = DIM < THREADS ? DIM : THREADS;
  DYNAMIC_SHARED(shared);
  float* rows = reinterpret_cast<float*>(shared);  // [16, D]
  u8* levels = reinterpret_cast<u8*>(rows + SIGN_BLOCK * DIM);  // [16, D]
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const T* from = x + blockIdx.z * by.batch + blockIdx.y * by.head + static_cast<i64>(blockIdx.x) * SIGN_BLOCK * by.row;
  for (int i = threadIdx.x; i < SIGN_BLOCK * DIM; i += THREADS) rows[i] = to_float(from[i / DIM * by.row + i % DIM]) - centre[head * DIM + i % DIM];
  __syncthreads();
  // Threads share a channel where there are fewer: each takes a part of the keys.
  constexpr int PARTS = THREADS / ACROSS, KEYS = SIGN_BLOCK / PARTS, CHANNELS = DIM / ACROSS;
  int part = threadIdx.x / ACROSS;
  float made[CHANNELS][KEYS];
#pragma unroll
  for (int c = 0; c < CHANNELS; c++) {
    int d = threadIdx.x % ACROSS + c * ACROSS;
#pragma unroll
    for (int key = 0; key < KEYS; key++) made[c][key] = 0.f;
#pragma unroll 4
    for (int e = 0; e < DIM; e++) {
      float weight = turned[e * DIM + d];
#pragma unroll
      for (int key = 0; key < KEYS; key++) made[c][key] += weight * rows[(part * KEYS + key) * DIM + e];
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < CHANNELS; c++)
#pragma unroll
    for (int key = 0; key < KEYS; key++) rows[(part * KEYS + key) * DIM + threadIdx.x % ACROSS + c * ACROSS] = made[c][key];
  __syncthreads();
  u8* block = codes + (head * gridDim.x + blockIdx.x) * (8 * DIM + 2 * SIGN_BLOCK);
  int lane = threadIdx.x % WARP;
  for (int key = threadIdx.x / WARP; key < SIGN_BLOCK; key += THREADS / WARP) {
    float v[MINE], norm2 = 0.f;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      v[i] = rows[key * DIM + i * WARP + lane];
      norm2 += v[i] * v[i];
    }
    norm2 = lanes_sum<WARP>(norm2);
    float unit = norm2 > 0.f ? sqrtf(DIM / norm2) : 0.f, best = -1.f, best_grown = 0.f, best_product = 1.f;
    // Steps of the grid, relative to the root mean square of the coordinates.
    const float steps[5] = {0.22f, 0.27f, 0.32f, 0.37f, 0.42f};
#pragma unroll
    for (int s = 0; s < 5; s++) {
      float grown = unit / steps[s], product = 0.f, square = 0.f;
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        float y = fminf(fmaxf(rintf(v[i] * grown - 0.5f) + 0.5f, -7.5f), 7.5f);
        product += v[i] * y;
        square += y * y;
      }
      product = lanes_sum<WARP>(product);
      float cosine = norm2 > 0.f ? product / sqrtf(lanes_sum<WARP>(square) * norm2) : 0.f;
      if (cosine > best) {
        best = cosine;
        best_grown = grown;
        best_product = product;
      }
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      float y = fminf(fmaxf(rintf(v[i] * best_grown - 0.5f) + 0.5f, -7.5f), 7.5f);
      levels[key * DIM + i * WARP + lane] = static_cast<u8>(y + 7.5f);
    }
    f16 factor;
    from_float(norm2 > 0.f ? norm2 / best_product : 0.f, factor);
    if (lane == 0) reinterpret_cast<u16*>(block + 8 * DIM)[key] = factor.bits;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SIGN_BLOCK * DIM / 8; i += THREADS) {
    const u8* of = levels + i % SIGN_BLOCK * DIM + i / SIGN_BLOCK * 8;
    u32 word = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) word |= static_cast<u32>(of[t] | of[t + 4] << 4) << 8 * t;
    reinterpret_cast<u32*>(block)[i] = word;
  }
}

// ---- queries ----
// A query rotated and rounded to signed bytes: quads [B, H, G, D / 4], and what makes a score of a dot product of bytes, [B, H, G, 3]: step,
// half a grid's width times the sum of bytes, and the product with the centre. q [B, H, G, D]. Grid: G, heads, batch; a thread a channel.
template <class T, int DIM>
DEVICE void prepare(const T* q, const float* centre, const float* turned, u32* quads, float* numbers, Strides by, float scale) {
  constexpr int WARPS = DIM / WARP;
  DYNAMIC_SHARED(shared);
  float* query = reinterpret_cast<float*>(shared);  // [D]
  float* of_warps = query + DIM;                    // [3, warps]
  u8* bytes = reinterpret_cast<u8*>(of_warps + 3 * WARPS);
  int d = threadIdx.x, lane = d % WARP, warp = d / WARP;
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y, at = head * gridDim.x + blockIdx.x;
  float own = to_float(q[blockIdx.z * by.batch + blockIdx.y * by.head + blockIdx.x * by.row + d]) * scale;
  query[d] = own;
  __syncthreads();
  float sum = 0.f;
#pragma unroll 4
  for (int e = 0; e < DIM; e++) sum += turned[e * DIM + d] * query[e];
  float largest = lanes_max<WARP>(fabsf(sum)), base = lanes_sum<WARP>(own * centre[head * DIM + d]);
  if (lane == 0) {
    of_warps[warp] = largest;
    of_warps[WARPS + warp] = base;
  }
  __syncthreads();
  largest = base = 0.f;
  for (int w = 0; w < WARPS; w++) {
    largest = fmaxf(largest, of_warps[w]);
    base += of_warps[WARPS + w];
  }
  float step = largest > 0.f ? largest / 127.f : 1.f, rounded = rintf(sum / step);
  bytes[d] = static_cast<u8>(static_cast<int>(rounded) & 0xff);
  float total = lanes_sum<WARP>(rounded);
  if (lane == 0) of_warps[2 * WARPS + warp] = total;
  __syncthreads();
  if (d < DIM / 4) quads[at * (DIM / 4) + d] = reinterpret_cast<u32*>(bytes)[d];
  if (d == 0) {
    total = 0.f;
    for (int w = 0; w < WARPS; w++) total += of_warps[2 * WARPS + w];
    numbers[3 * at] = step;
    numbers[3 * at + 1] = 7.5f * total;
    numbers[3 * at + 2] = base;
  }
}

// ---- scan ----
// A number's bits so that unsigned integers are in the order of the numbers.
DEVICE u32 ordered(float x) {
  u32 bits = static_cast<u32>(__float_as_int(x));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The largest estimated logit of a group for each row, in order-preserving bits, [B, H, rows], and how many rows have each value of the
// first 11 bits; rows are 16 per block of codes. Grid: rows / CHOICE_ROWS, heads, batch.
DEVICE void scan(const u32* quads, const float* numbers, const u8* codes, u32* scores, int* counts, i64 by_batch, i64 by_head, int group,
                 int rows, int dim) {
  DYNAMIC_SHARED(shared);
  int words = dim / 4, block_bytes = 8 * dim + 2 * SIGN_BLOCK;
  u32* query = reinterpret_cast<u32*>(shared);                         // [group, D / 4]
  float* of_query = reinterpret_cast<float*>(query + group * words);   // [group, 3]
  int* histogram = reinterpret_cast<int*>(of_query + 3 * group);       // [2048]
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < group * words; i += SIGN_THREADS) query[i] = quads[head * group * words + i];
  for (int i = threadIdx.x; i < group * 3; i += SIGN_THREADS) of_query[i] = numbers[head * group * 3 + i];
  for (int i = threadIdx.x; i < SIGN_BINS; i += SIGN_THREADS) histogram[i] = 0;
  __syncthreads();
  const u8* from = codes + blockIdx.z * by_batch + blockIdx.y * by_head;
  int first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows);
  for (int row = first + threadIdx.x; row < end; row += SIGN_THREADS) {
    const u8* block = from + static_cast<i64>(row / SIGN_BLOCK) * block_bytes;
    const u32* of_key = reinterpret_cast<const u32*>(block) + row % SIGN_BLOCK;
    float factor = to_float(f16{reinterpret_cast<const u16*>(block + 8 * dim)[row % SIGN_BLOCK]}), best = -infinity();
    for (int g = 0; g < group; g += SIGN_QUERIES) {  // codes beyond 8 queries are read again
      int dots[SIGN_QUERIES] = {};
#pragma unroll 4
      for (int w = 0; w < words; w += 2) {
        u32 both = of_key[w / 2 * SIGN_BLOCK], low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma unroll
        for (int i = 0; i < SIGN_QUERIES; i++) {
          if (g + i >= group) break;
          dots[i] = dot_of_bytes(query[(g + i) * words + w], low, dots[i]);
          dots[i] = dot_of_bytes(query[(g + i) * words + w + 1], high, dots[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < SIGN_QUERIES; i++) {
        if (g + i >= group) break;
        const float* by = of_query + 3 * (g + i);
        best = fmaxf(best, (static_cast<float>(dots[i]) - by[1]) * by[0] * factor + by[2]);
      }
    }
    u32 score = ordered(best);
    scores[head * rows + row] = score;
    atomicAdd(histogram + (score >> 21), 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SIGN_BINS; i += SIGN_THREADS)
    if (histogram[i]) atomicAdd(counts + head * SIGN_BINS + i, histogram[i]);
}

#define SIGN(T, NAME, D)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(128) signatures_encode_##NAME##_##D(                                             \
      const T* x, const float* centre, const float* turned, u8* codes, i64 by_batch, i64 by_head, i64 by_row) {                  \
    encode<T, D>(x, centre, turned, codes, {by_batch, by_head, by_row});                                                         \
  }                                                                                                                              \
  KERNEL(signatures_encode_##NAME##_##D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(D) signatures_prepare_##NAME##_##D(                                              \
      const T* q, const float* centre, const float* turned, u32* quads, float* numbers, i64 by_batch, i64 by_head, i64 by_row,   \
      float scale) {                                                                                                             \
    prepare<T, D>(q, centre, turned, quads, numbers, {by_batch, by_head, by_row}, scale);                                        \
  }                                                                                                                              \
  KERNEL(signatures_prepare_##NAME##_##D)
#define SIGN_DIMS(T, NAME)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                         \
      signatures_sums_##NAME(const T* x, float* sums, i64 by_batch, i64 by_head, i64 by_row, int rows, int dim) { \
    sums_of_rows<T>(x, sums, {by_batch, by_head, by_row}, rows, dim);                                                       \
  }                                                                                                                         \
  KERNEL(signatures_sums_##NAME)                                                                                            \
  SIGN(T, NAME, 64) SIGN(T, NAME, 128) SIGN(T, NAME, 256)
SIGN_DIMS(float, f32)
SIGN_DIMS(f16, f16)
SIGN_DIMS(bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) signatures_mean(const float* sums, float* centre, int blocks, int rows, int dim) {
  mean_of_sums(sums, centre, blocks, rows, dim);
}
KERNEL(signatures_mean)
extern "C" __global__ void __launch_bounds__(SIGN_THREADS)
    signatures_scan(const u32* quads, const float* numbers, const u8* codes, u32* scores, int* counts, i64 by_batch, i64 by_head, int group,
                    int rows, int dim) {
  scan(quads, numbers, codes, scores, counts, by_batch, by_head, group, rows, dim);
}
KERNEL(signatures_scan)
extern "C" __global__ void __launch_bounds__(CHOICE_THREADS)
    signatures_histogram(const u32* scores, const u32* threshold, int* counts, int rows, int shift, int bins) {
  choice_histogram(scores, threshold, counts, rows, shift, bins);
}
KERNEL(signatures_histogram)
CHOICE(u32, u32)
