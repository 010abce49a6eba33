// Attention of a few query rows over long keys, the keys cut into splits; merge.cu puts the splits together.
//
// The query heads of a KV head and their positions are the rows, up to ROWS in a block. A warp goes through keys of its own, 16
// at a time, so that no barrier but the warp's own stands in its loop; the four warps' results are merged at the end.
//
// Arguments: q [B, Hkv, rows, D] contiguous, where row r is position r % positions of the KV head's query head r / positions; keys
// and values by strides in elements, last axis contiguous; `listed`: rows of the keys to read, [B, Hkv, most], or null; `lengths`:
// keys (or listed rows) of each sequence, or null for `most`; `scale`: of the scores, times log2(e). With `causal` a row at position i
// sees the keys up to length - positions + i. Out: `partial` [B, Hkv, rows, splits, D] and its log-sum-exp in natural logs.
// Grid: splits, KV heads times blocks of rows, batch.

constexpr int DECODE_WARPS = 4;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;

struct DecodeRange {
  int from, to, length;
};

DEVICE DecodeRange decode_range(const int* lengths, int most, int split_keys) {
  int length = lengths ? min(lengths[blockIdx.z], most) : most;
  int from = static_cast<int>(blockIdx.x) * split_keys;
  return {from, min(from + split_keys, length), length};
}

// First key that a row does not see.
DEVICE int decode_limit(const DecodeRange& range, bool causal, int row, int positions) {
  return causal ? min(range.to, range.length - positions + row % positions + 1) : range.to;
}

// Puts together what `parts` groups of lanes have of each row, in units of log 2: largest score and sum [rows, parts], sum of values
// [rows, parts, D]. The first of the rows is row `first` of the output.
template <int DIM>
DEVICE void decode_merge(const float* maxima, const float* sums, const float* outputs, int parts, int rows, i64 first, float* partial,
                         float* lse) {
  __syncthreads();
  for (int e = threadIdx.x; e < rows * DIM; e += DECODE_THREADS) {
    int row = e / DIM, d = e % DIM;
    float most = -infinity(), sum = 0.f, o = 0.f;
    for (int p = 0; p < parts; p++) most = fmaxf(most, maxima[row * parts + p]);
    if (most > -infinity()) {
      for (int p = 0; p < parts; p++) {
        float weight = exp2f(maxima[row * parts + p] - most);
        sum += weight * sums[row * parts + p];
        o += weight * outputs[(row * parts + p) * DIM + d];
      }
    }
    i64 to = (first + row) * gridDim.x + blockIdx.x;
    partial[to * DIM + d] = sum > 0.f ? o / sum : 0.f;
    if (d == 0) lse[to] = sum > 0.f ? (most + log2f(sum)) * LN_2 : -infinity();
  }
}

// ---- matrix products: 16-bit numbers, up to 16 rows ----
constexpr int DECODE_STAGES = 3;
constexpr int DECODE_KEYS = 16;  // of a warp at a time

template <class T, int DIM>
DEVICE void decode_load(const Tile<T, DIM>& tile, const T* base, i64 stride, const int* listed, int first, int to, int lane) {
  // Two lanes a row.
  int row = lane >> 1;
  bool valid = first + row < to;
  i64 at = valid ? (listed ? listed[first + row] : first + row) : 0;
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) {
    int piece = (lane & 1) + 2 * i;
    copy_async(tile.piece(row, piece), base + at * stride + piece * 8, valid);
  }
}

template <class T, int DIM>
DEVICE void decode_matrices(const T* q, const T* k, const T* v, const int* listed, const int* lengths, float* partial, float* lse,
                            i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, int most, int split_keys,
                            int all_rows, int positions, float scale, int causal) {
  constexpr int STEPS = DIM / 16;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  int row_blocks = (all_rows + 15) / 16;
  int head = blockIdx.y / row_blocks, row_from = blockIdx.y % row_blocks * 16, rows = min(16, all_rows - row_from);
  int heads = gridDim.y / row_blocks;
  DecodeRange range = decode_range(lengths, most, split_keys);
  const T* keys = k + blockIdx.z * k_batch + head * k_head;
  const T* values = v + blockIdx.z * v_batch + head * v_head;
  i64 batch_head = static_cast<i64>(blockIdx.z) * heads + head, first_row = batch_head * all_rows + row_from;
  const T* queries = q + first_row * DIM;
  const int* list = listed ? listed + batch_head * most : nullptr;

  DYNAMIC_SHARED(shared);
  Tile<T, DIM> q_tile{reinterpret_cast<T*>(shared)};
  T* stages = q_tile.base + 16 * DIM + warp * (DECODE_STAGES * 2 * DECODE_KEYS * DIM);
  constexpr int STAGE = 2 * DECODE_KEYS * DIM;

  for (int i = threadIdx.x; i < 16 * (DIM / 8); i += DECODE_THREADS) {
    int row = i / (DIM / 8), piece = i % (DIM / 8);
    bool valid = row < rows;
    copy_async(q_tile.piece(row, piece), queries + (valid ? row * DIM + piece * 8 : 0), valid);
  }
  commit_async();
  wait_async<0>();
  __syncthreads();
  u32 q_parts[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; s++) load_matrices(q_parts[s], q_tile.piece(lane & 15, 2 * s + (lane >> 4)));

  float o[DIM / 8][4], maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < DIM / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) o[i][j] = 0.f;
  int limits[2];
#pragma unroll
  for (int i = 0; i < 2; i++) limits[i] = decode_limit(range, causal, row_from + group + 8 * i, positions);

  int first = range.from + warp * DECODE_KEYS;
  constexpr int STRIDE = DECODE_WARPS * DECODE_KEYS;
#pragma unroll
  for (int s = 0; s < DECODE_STAGES - 1; s++) {
    int at = first + s * STRIDE;
    if (at < range.to) {
      decode_load(Tile<T, DIM>{stages + s * STAGE}, keys, k_row, list, at, range.to, lane);
      decode_load(Tile<T, DIM>{stages + s * STAGE + DECODE_KEYS * DIM}, values, v_row, list, at, range.to, lane);
    }
    commit_async();
  }
  int stage = 0;
  for (int at = first; at < range.to; at += STRIDE) {
    int ahead = at + (DECODE_STAGES - 1) * STRIDE, next = stage == 0 ? DECODE_STAGES - 1 : stage - 1;
    if (ahead < range.to) {
      decode_load(Tile<T, DIM>{stages + next * STAGE}, keys, k_row, list, ahead, range.to, lane);
      decode_load(Tile<T, DIM>{stages + next * STAGE + DECODE_KEYS * DIM}, values, v_row, list, ahead, range.to, lane);
    }
    commit_async();
    wait_async<DECODE_STAGES - 1>();
    __syncwarp();
    Tile<T, DIM> k_tile{stages + stage * STAGE}, v_tile{stages + stage * STAGE + DECODE_KEYS * DIM};

    float scores[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      u32 part[4];
      load_matrices(part, k_tile.piece((lane & 7) + ((lane >> 4) << 3), 2 * s + ((lane >> 3) & 1)));
      multiply(scores[0], q_parts[s], part[0], part[1], T{});
      multiply(scores[1], q_parts[s], part[2], part[3], T{});
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most_now = maxima[i];
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = scores[n][2 * i + j];
          x = at + n * 8 + in_group * 2 + j < limits[i] ? x * scale : -infinity();
          most_now = fmaxf(most_now, x);
        }
      most_now = lanes_max<4>(most_now);
      float base = most_now > -infinity() ? most_now : 0.f, shrink = exp2f(maxima[i] - base);
      maxima[i] = most_now;
      sums[i] *= shrink;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = scores[n][2 * i + j];
          x = exp2f(x - base);
          sums[i] += x;
        }
    }
    u32 weights[4] = {pair_of<T>(scores[0][0], scores[0][1]), pair_of<T>(scores[0][2], scores[0][3]),
                      pair_of<T>(scores[1][0], scores[1][1]), pair_of<T>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
      u32 part[4];
      load_matrices_transposed(part, v_tile.piece(lane & 15, 2 * d + (lane >> 4)));
      multiply(o[2 * d], weights, part[0], part[1], T{});
      multiply(o[2 * d + 1], weights, part[2], part[3], T{});
    }
    __syncwarp();  // the stage is free
    stage = stage == DECODE_STAGES - 1 ? 0 : stage + 1;
  }
  wait_async<0>();
  __syncthreads();  // results take the stages' place

  float* to_maxima = reinterpret_cast<float*>(shared);
  float* to_sums = to_maxima + 16 * DECODE_WARPS;
  float* outputs = to_sums + 16 * DECODE_WARPS;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = lanes_sum<4>(sums[i]);
    int part = (group + 8 * i) * DECODE_WARPS + warp;
    if (in_group == 0) {
      to_maxima[part] = maxima[i];
      to_sums[part] = sum;
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int j = 0; j < 2; j++) outputs[part * DIM + d * 8 + in_group * 2 + j] = o[d][2 * i + j];
  }
  decode_merge<DIM>(to_maxima, to_sums, outputs, DECODE_WARPS, rows, first_row, partial, lse);
}

// ---- products of floats, ROWS rows ----
template <int DIM, int ROWS>
DEVICE void decode_floats(const float* q, const float* k, const float* v, const int* listed, const int* lengths, float* partial,
                          float* lse, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, int most,
                          int split_keys, int all_rows, int positions, float scale, int causal) {
  // A key is read by LANES lanes, PER_LANE vectors of 4 each.
  constexpr int PER_LANE = DIM > 128 ? DIM / 128 : 1, LANES = DIM / 4 / PER_LANE, KEYS = WARP / LANES, PARTS = DECODE_WARPS * KEYS;
  static_assert(LANES <= WARP && WARP % LANES == 0, "lanes of a key");
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, key = lane / LANES, in_key = lane % LANES;
  int row_blocks = (all_rows + ROWS - 1) / ROWS;
  int head = blockIdx.y / row_blocks, row_from = blockIdx.y % row_blocks * ROWS, rows = min(ROWS, all_rows - row_from);
  int heads = gridDim.y / row_blocks;
  DecodeRange range = decode_range(lengths, most, split_keys);
  i64 batch_head = static_cast<i64>(blockIdx.z) * heads + head, first_row = batch_head * all_rows + row_from;
  const float* keys = k + blockIdx.z * k_batch + head * k_head;
  const float* values = v + blockIdx.z * v_batch + head * v_head;
  const int* list = listed ? listed + batch_head * most : nullptr;

  float query[ROWS][PER_LANE][4], o[ROWS][PER_LANE][4], maxima[ROWS], sums[ROWS];
  int limits[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    maxima[r] = -infinity();
    sums[r] = 0.f;
    limits[r] = r < rows ? decode_limit(range, causal, row_from + r, positions) : 0;
#pragma unroll
    for (int p = 0; p < PER_LANE; p++) {
      Vector16<float> x = load16(q + (first_row + min(r, rows - 1)) * DIM + (p * LANES + in_key) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        query[r][p][i] = x.at[i] * scale;
        o[r][p][i] = 0.f;
      }
    }
  }
  for (int at = range.from + warp * KEYS; at < range.to; at += PARTS) {
    int j = at + key;
    bool valid = j < range.to;
    i64 row = valid ? (list ? list[j] : j) : 0;
    Vector16<float> k_part[PER_LANE] = {}, v_part[PER_LANE] = {};
    if (valid) {
#pragma unroll
      for (int p = 0; p < PER_LANE; p++) {
        k_part[p] = load16(keys + row * k_row + (p * LANES + in_key) * 4);
        v_part[p] = load16(values + row * v_row + (p * LANES + in_key) * 4);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float score = 0.f;
#pragma unroll
      for (int p = 0; p < PER_LANE; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) score += query[r][p][i] * k_part[p].at[i];
      score = lanes_sum<LANES>(score);
      if (j >= limits[r]) continue;
      float most_now = fmaxf(maxima[r], score), shrink = exp2f(maxima[r] - most_now), weight = exp2f(score - most_now);
      maxima[r] = most_now;
      sums[r] = sums[r] * shrink + weight;
#pragma unroll
      for (int p = 0; p < PER_LANE; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[r][p][i] = o[r][p][i] * shrink + weight * v_part[p].at[i];
    }
  }
  DYNAMIC_SHARED(shared);
  float* to_maxima = reinterpret_cast<float*>(shared);
  float* to_sums = to_maxima + ROWS * PARTS;
  float* outputs = to_sums + ROWS * PARTS;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    int part = r * PARTS + warp * KEYS + key;
    if (in_key == 0) {
      to_maxima[part] = maxima[r];
      to_sums[part] = sums[r];
    }
#pragma unroll
    for (int p = 0; p < PER_LANE; p++)
#pragma unroll
      for (int i = 0; i < 4; i++) outputs[part * DIM + (p * LANES + in_key) * 4 + i] = o[r][p][i];
  }
  decode_merge<DIM>(to_maxima, to_sums, outputs, PARTS, rows, first_row, partial, lse);
}

#define DECODE_ARGUMENTS(T)                                                                                                      \
  const T *q, const T *k, const T *v, const int *listed, const int *lengths, float *partial, float *lse, i64 k_batch, i64 k_head, \
      i64 k_row, i64 v_batch, i64 v_head, i64 v_row, int most, int split_keys, int all_rows, int positions, float scale, int causal
#define DECODE_PASSED                                                                                                      \
  q, k, v, listed, lengths, partial, lse, k_batch, k_head, k_row, v_batch, v_head, v_row, most, split_keys, all_rows, positions, \
      scale, causal
#define DECODE_MATRICES(T, D)                                                                           \
  extern "C" __global__ void __launch_bounds__(DECODE_THREADS) decode_##T##_##D(DECODE_ARGUMENTS(T)) { \
    decode_matrices<T, D>(DECODE_PASSED);                                                               \
  }                                                                                                     \
  KERNEL(decode_##T##_##D)
#define DECODE_FLOATS(D, ROWS)                                                                                       \
  extern "C" __global__ void __launch_bounds__(DECODE_THREADS) decode_f32_##D##_##ROWS(DECODE_ARGUMENTS(float)) { \
    decode_floats<D, ROWS>(DECODE_PASSED);                                                                           \
  }                                                                                                                  \
  KERNEL(decode_f32_##D##_##ROWS)
DECODE_MATRICES(f16, 64)
DECODE_MATRICES(f16, 128)
DECODE_MATRICES(f16, 256)
DECODE_MATRICES(bf16, 64)
DECODE_MATRICES(bf16, 128)
DECODE_MATRICES(bf16, 256)
DECODE_FLOATS(64, 1)
DECODE_FLOATS(64, 4)
DECODE_FLOATS(128, 1)
DECODE_FLOATS(128, 4)
DECODE_FLOATS(256, 1)
DECODE_FLOATS(256, 4)
