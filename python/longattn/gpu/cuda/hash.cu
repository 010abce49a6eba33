// Sign codes of keys: making them, and scanning them for a group of queries; choice.cuh finds the best rows.
//
// A code is WORDS words of 32 bits; bit t of word w is set where (x W)[32 w + t] > 0. A row's score is the number of bits that agree,
// summed over the queries of a group, so at most 32 WORDS G: an integer, of which the largest are found by counting.

constexpr int HASH_THREADS = 256;

// ---- codes ----
// x [B, H, n, D] by strides, weights [H, D, 32 words] in float32, codes [B, H, n, words]. A warp a row. Grid: rows / 8, heads, batch.
template <class T, int DIM>
DEVICE void hash_encode(const T* x, const float* weights, u32* codes, i64 by_batch, i64 by_head, i64 by_row, int rows, int words) {
  int lane = threadIdx.x % WARP, row = blockIdx.x * (HASH_THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  const T* from = x + blockIdx.z * by_batch + blockIdx.y * by_head + row * by_row;
  const float* matrix = weights + static_cast<i64>(blockIdx.y) * DIM * words * 32;
  u32* to = codes + ((static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y) * rows + row) * words;
  for (int w = 0; w < words; w++) {
    float sum = 0.f;
    for (int d = 0; d < DIM; d += 8) {
      float part[8];
#pragma unroll
      for (int i = 0; i < 8; i++) part[i] = to_float(from[d + i]);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += part[i] * matrix[static_cast<i64>(d + i) * words * 32 + w * 32 + lane];
    }
    u32 word = __ballot_sync(ALL_LANES, sum > 0.f);
    if (lane == 0) to[w] = word;
  }
}

// ---- scan ----
// queries [B, H, G, words], codes [B, H, rows, words] by strides of batch and head; scores [B, H, rows]; counts [B, H, bins], zeroed, gets
// how many rows have each score. Grid: rows / CHOICE_ROWS, heads, batch.
template <int WORDS>
DEVICE void hash_scan(const u32* queries, const u32* codes, u16* scores, int* counts, i64 by_batch, i64 by_head, int group, int rows,
                      int bins) {
  DYNAMIC_SHARED(shared);
  u32* query = reinterpret_cast<u32*>(shared);                 // [group, WORDS]
  int* histogram = reinterpret_cast<int*>(query + group * WORDS);  // [bins]
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < group * WORDS; i += HASH_THREADS) query[i] = queries[head * group * WORDS + i];
  for (int i = threadIdx.x; i < bins; i += HASH_THREADS) histogram[i] = 0;
  __syncthreads();
  const u32* from = codes + blockIdx.z * by_batch + blockIdx.y * by_head;
  int first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows);
  for (int row = first + threadIdx.x; row < end; row += HASH_THREADS) {
    u32 code[WORDS];
    if (WORDS % 4 == 0) {
#pragma unroll
      for (int w = 0; w < WORDS / 4; w++) {
        Vector16<u32> part = load16(from + static_cast<i64>(row) * WORDS + 4 * w);
#pragma unroll
        for (int i = 0; i < 4; i++) code[(4 * w + i) % WORDS] = part.at[i];
      }
    } else {
#pragma unroll
      for (int w = 0; w < WORDS; w++) code[w] = from[static_cast<i64>(row) * WORDS + w];
    }
    int differ = 0;
    for (int g = 0; g < group; g++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) differ += __popc(code[w] ^ query[g * WORDS + w]);
    int score = group * WORDS * 32 - differ;
    scores[head * rows + row] = static_cast<u16>(score);
    atomicAdd(histogram + score, 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += HASH_THREADS)
    if (histogram[i]) atomicAdd(counts + head * bins + i, histogram[i]);
}

#define HASH_ENCODE(T, NAME, D)                                                                                                \
  extern "C" __global__ void __launch_bounds__(HASH_THREADS) hash_encode_##NAME##_##D(                                         \
      const T* x, const float* weights, u32* codes, i64 by_batch, i64 by_head, i64 by_row, int rows, int words) { \
    hash_encode<T, D>(x, weights, codes, by_batch, by_head, by_row, rows, words);                                              \
  }                                                                                                                            \
  KERNEL(hash_encode_##NAME##_##D)
#define HASH_ENCODE_DIMS(T, NAME) HASH_ENCODE(T, NAME, 64) HASH_ENCODE(T, NAME, 128) HASH_ENCODE(T, NAME, 256)
HASH_ENCODE_DIMS(float, f32)
HASH_ENCODE_DIMS(f16, f16)
HASH_ENCODE_DIMS(bf16, bf16)

#define HASH_SCAN(WORDS)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(HASH_THREADS)                                                                     \
      hash_scan_##WORDS(const u32* queries, const u32* codes, u16* scores, int* counts, i64 by_batch, i64 by_head, int group, \
                        int rows, int bins) {                                                                                    \
    hash_scan<WORDS>(queries, codes, scores, counts, by_batch, by_head, group, rows, bins);                                      \
  }                                                                                                                              \
  KERNEL(hash_scan_##WORDS)
HASH_SCAN(1)
HASH_SCAN(2)
HASH_SCAN(4)
HASH_SCAN(8)

CHOICE(u16, u16)
