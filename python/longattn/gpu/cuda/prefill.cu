// Attention of many query rows: 16 rows a warp, tiles of 64 keys, matrix products, softmax on the way.
//
// Keys and values of a tile have one buffer each: values are fetched while scores are computed, the next keys while values are used.
//
// Arguments: q, k, v, out by strides in elements (batch, head, row), last axis contiguous; `starts` and `blocks`: the tiles that a
// block of query rows reads, ascending, starts [B, Hq, query blocks + 1], or null for all; `scale`: of the scores, times log2(e);
// a row at i sees keys from i + keys - rows - left to i + keys - rows + right, each end open where the number is negative (causal:
// right = 0). lse [B, Hq, rows] in natural logs. Grid: blocks of 16 WARPS rows, query heads, batch.

constexpr int PREFILL_KEYS = LISTED_KEYS;

template <class T, int DIM, int ROWS, int THREADS>
DEVICE void prefill_load(const Tile<T, DIM>& tile, const T* base, i64 stride, int first, int to) {
  constexpr int PIECES = DIM / 8;
#pragma unroll 4
  for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
    int at = threadIdx.x + i * THREADS, row = at / PIECES, piece = at % PIECES;
    bool valid = first + row < to;
    copy_async(tile.piece(row, piece), base + (valid ? (first + row) * stride + piece * 8 : 0), valid);
  }
}

template <class T, int DIM, int WARPS>
DEVICE void prefill(const T* q, const T* k, const T* v, T* out, float* lse, const int* starts, const int* blocks, Strides q_by,
                    Strides k_by, Strides v_by, Strides out_by, int heads_per_kv, int rows, int keys, int left, int right, float scale) {
  constexpr int THREADS = WARPS * WARP, ROWS = WARPS * 16, STEPS = DIM / 16;
  constexpr bool KEEP_QUERIES = DIM <= 128;  // in registers; wider ones are loaded again for every tile
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  // Blocks of late rows have most keys where there is causality: they start first.
  int row_block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first_row = row_block * ROWS;
  const T* queries = q + blockIdx.z * q_by.batch + head * q_by.head;
  const T* all_keys = k + blockIdx.z * k_by.batch + head / heads_per_kv * k_by.head;
  const T* all_values = v + blockIdx.z * v_by.batch + head / heads_per_kv * v_by.head;

  Tiles tiles = tiles_of(first_row, ROWS, rows, keys, left, right, starts, blocks, row_block);
  int from = tiles.from, until = tiles.until, offset = tiles.offset;

  DYNAMIC_SHARED(shared);
  Tile<T, DIM> q_tile{reinterpret_cast<T*>(shared)}, k_tile{q_tile.base + ROWS * DIM}, v_tile{k_tile.base + PREFILL_KEYS * DIM};
  prefill_load<T, DIM, ROWS, THREADS>(q_tile, queries, q_by.row, first_row, rows);
  if (from < until) {
    int tile = tiles.at(from);
    prefill_load<T, DIM, PREFILL_KEYS, THREADS>(k_tile, all_keys, k_by.row, tile * PREFILL_KEYS, keys);
  }
  commit_async();

  float o[DIM / 8][4], maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.f, 0.f};
#pragma unroll
  for (int d = 0; d < DIM / 8; d++)
#pragma unroll
    for (int j = 0; j < 4; j++) o[d][j] = 0.f;
  int sees_from[2], sees_to[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = first_row + warp * 16 + group + 8 * i;
    sees_from[i] = left < 0 ? 0 : row + offset - left;
    sees_to[i] = row >= rows ? 0 : right < 0 ? keys : min(keys, row + offset + right + 1);
  }
  u32 q_parts[KEEP_QUERIES ? STEPS : 1][4];

  for (int c = from; c < until; c++) {
    int tile = tiles.at(c);
    wait_async<0>();
    __syncthreads();  // these keys are there, the values before are used up
    prefill_load<T, DIM, PREFILL_KEYS, THREADS>(v_tile, all_values, v_by.row, tile * PREFILL_KEYS, keys);
    commit_async();
    if (KEEP_QUERIES && c == from) {
#pragma unroll
      for (int s = 0; s < STEPS; s++) load_matrices(q_parts[s % (KEEP_QUERIES ? STEPS : 1)], q_tile.piece(warp * 16 + (lane & 15), 2 * s + (lane >> 4)));
    }
    float scores[PREFILL_KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[n][j] = 0.f;
#pragma unroll(KEEP_QUERIES ? STEPS : 2)
    for (int s = 0; s < STEPS; s++) {
      u32(&q_part)[4] = q_parts[KEEP_QUERIES ? s : 0];
      if (!KEEP_QUERIES) load_matrices(q_part, q_tile.piece(warp * 16 + (lane & 15), 2 * s + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 16; n++) {
        u32 part[4];
        load_matrices(part, k_tile.piece(n * 16 + (lane & 7) + ((lane >> 4) << 3), 2 * s + ((lane >> 3) & 1)));
        multiply(scores[2 * n], q_part, part[0], part[1], T{});
        multiply(scores[2 * n + 1], q_part, part[2], part[3], T{});
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = maxima[i];
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = scores[n][2 * i + j];
          int key = tile * PREFILL_KEYS + n * 8 + in_group * 2 + j;
          x = key >= sees_from[i] && key < sees_to[i] ? x * scale : -infinity();
          most = fmaxf(most, x);
        }
      most = lanes_max<4>(most);
      float base = most > -infinity() ? most : 0.f, shrink = exp2f(maxima[i] - base);
      maxima[i] = most;
      sums[i] *= shrink;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = scores[n][2 * i + j];
          x = exp2f(x - base);
          sums[i] += x;
        }
    }
    wait_async<0>();
    __syncthreads();  // the values are there, the keys are used up
    if (c + 1 < until) {
      int next = tiles.at(c + 1);
      prefill_load<T, DIM, PREFILL_KEYS, THREADS>(k_tile, all_keys, k_by.row, next * PREFILL_KEYS, keys);
    }
    commit_async();
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 16; n++) {
      u32 weights[4] = {pair_of<T>(scores[2 * n][0], scores[2 * n][1]), pair_of<T>(scores[2 * n][2], scores[2 * n][3]),
                        pair_of<T>(scores[2 * n + 1][0], scores[2 * n + 1][1]), pair_of<T>(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < DIM / 16; d++) {
        u32 part[4];
        load_matrices_transposed(part, v_tile.piece(n * 16 + (lane & 15), 2 * d + (lane >> 4)));
        multiply(o[2 * d], weights, part[0], part[1], T{});
        multiply(o[2 * d + 1], weights, part[2], part[3], T{});
      }
    }
  }
  wait_async<0>();

#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = first_row + warp * 16 + group + 8 * i;
    float sum = lanes_sum<4>(sums[i]), inverse = sum > 0.f ? 1.f / sum : 0.f;
    if (row >= rows) continue;
    if (in_group == 0) lse[(static_cast<i64>(blockIdx.z) * gridDim.y + head) * rows + row] = sum > 0.f ? (maxima[i] + log2f(sum)) * LN_2 : -infinity();
    T* to_row = out + blockIdx.z * out_by.batch + head * out_by.head + row * out_by.row;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
      *reinterpret_cast<u32*>(to_row + d * 8 + in_group * 2) = pair_of<T>(o[d][2 * i] * inverse, o[d][2 * i + 1] * inverse);
  }
}

#define PREFILL(T, D, WARPS)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP) prefill_##T##_##D##_##WARPS(                                            \
      const T* q, const T* k, const T* v, T* out, float* lse, const int* starts, const int* blocks, i64 q_batch, i64 q_head,         \
      i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 out_batch, i64 out_head, i64 out_row,   \
      int heads_per_kv, int rows, int keys, int left, int right, float scale) {                                                      \
    prefill<T, D, WARPS>(q, k, v, out, lse, starts, blocks, {q_batch, q_head, q_row}, {k_batch, k_head, k_row},                      \
                         {v_batch, v_head, v_row}, {out_batch, out_head, out_row}, heads_per_kv, rows, keys, left, right, scale); \
  }                                                                                                                                   \
  KERNEL(prefill_##T##_##D##_##WARPS)
#define PREFILL_DIMS(T) PREFILL(T, 64, 4) PREFILL(T, 64, 8) PREFILL(T, 128, 4) PREFILL(T, 128, 8) PREFILL(T, 256, 4)
PREFILL_DIMS(f16)
PREFILL_DIMS(bf16)
