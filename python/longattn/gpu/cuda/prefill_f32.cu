// Attention of many query rows in float32 throughout: for tests of gradients, small models, and whoever has such arrays.
//
// Arguments, lists of tiles and causality as in prefill.cu; a block has 64 query rows, a listed tile 64 keys, taken 32 at a time.
// A thread has 8 rows, and every 16th key and channel: rows 8 y .. 8 y + 8, keys x + 16 i, channels 4 x + 64 i.

namespace floats {
constexpr int THREADS = 128, ROWS = 64, KEYS = 32, ACROSS = 16, MINE = 8;

// A row is four floats longer than it needs, so that rows that follow one another begin in different banks.
template <int DIM, int COUNT>
DEVICE void load(float* to, const float* base, i64 stride, int first, int end) {
  constexpr int PIECES = DIM / 4;
  for (int at = threadIdx.x; at < COUNT * PIECES; at += THREADS) {
    int row = at / PIECES, piece = at % PIECES;
    bool valid = first + row < end;
    copy_async(to + row * (DIM + 4) + piece * 4, base + (valid ? (first + row) * stride + piece * 4 : 0), valid);
  }
}

template <int DIM>
DEVICE void prefill(const float* q, const float* k, const float* v, float* out, float* lse, const int* starts, const int* blocks,
                    Strides q_by, Strides k_by, Strides v_by, Strides out_by, int heads_per_kv, int rows, int keys, int left, int right,
                    float scale) {
  constexpr int PITCH = DIM + 4, CHANNELS = DIM / 64;
  int x = threadIdx.x % ACROSS, y = threadIdx.x / ACROSS;
  int row_block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first_row = row_block * ROWS;
  const float* queries = q + blockIdx.z * q_by.batch + head * q_by.head;
  const float* all_keys = k + blockIdx.z * k_by.batch + head / heads_per_kv * k_by.head;
  const float* all_values = v + blockIdx.z * v_by.batch + head / heads_per_kv * v_by.head;

  Tiles tiles = tiles_of(first_row, ROWS, rows, keys, left, right, starts, blocks, row_block);
  int offset = tiles.offset;

  DYNAMIC_SHARED(shared);
  float* q_tile = reinterpret_cast<float*>(shared);
  float* k_tile = q_tile + ROWS * PITCH;
  float* v_tile = k_tile + KEYS * PITCH;
  float* weights = v_tile + KEYS * PITCH;  // [ROWS, KEYS + 4]
  constexpr int WEIGHTS_PITCH = KEYS + 4;
  load<DIM, ROWS>(q_tile, queries, q_by.row, first_row, rows);
  commit_async();

  float o[MINE][CHANNELS][4], maxima[MINE], sums[MINE];
#pragma unroll
  for (int r = 0; r < MINE; r++) {
    maxima[r] = -infinity();
    sums[r] = 0.f;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[r][c][i] = 0.f;
  }
  for (int half = 2 * tiles.from; half < 2 * tiles.until; half++) {
    int first = tiles.at(half / 2) * LISTED_KEYS + half % 2 * KEYS;
    if (first >= tiles.to) continue;
    __syncthreads();  // the tile before is used up
    load<DIM, KEYS>(k_tile, all_keys, k_by.row, first, keys);
    load<DIM, KEYS>(v_tile, all_values, v_by.row, first, keys);
    commit_async();
    wait_async<0>();
    __syncthreads();
    float scores[MINE][2] = {};
#pragma unroll 4
    for (int d = 0; d < DIM; d += 4) {
      Vector16<float> a = load16(k_tile + x * PITCH + d), b = load16(k_tile + (x + ACROSS) * PITCH + d);
#pragma unroll
      for (int r = 0; r < MINE; r++) {
        Vector16<float> query = load16(q_tile + (y * MINE + r) * PITCH + d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scores[r][0] += query.at[i] * a.at[i];
          scores[r][1] += query.at[i] * b.at[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      int row = first_row + y * MINE + r, sees_from = left < 0 ? 0 : row + offset - left;
      int sees_to = right < 0 ? keys : min(keys, row + offset + right + 1);
      float most = maxima[r];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int key = first + x + ACROSS * i;
        scores[r][i] = key >= sees_from && key < sees_to ? scores[r][i] * scale : -infinity();
        most = fmaxf(most, scores[r][i]);
      }
      most = lanes_max<ACROSS>(most);
      float base = most > -infinity() ? most : 0.f, shrink = exp2f(maxima[r] - base);
      maxima[r] = most;
      sums[r] *= shrink;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float weight = exp2f(scores[r][i] - base);
        sums[r] += weight;
        weights[(y * MINE + r) * WEIGHTS_PITCH + x + ACROSS * i] = weight;
      }
#pragma unroll
      for (int c = 0; c < CHANNELS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[r][c][i] *= shrink;
    }
    __syncwarp();  // a row's weights are its warp's own
    for (int j = 0; j < KEYS; j++) {
      Vector16<float> value[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) value[c] = load16(v_tile + j * PITCH + c * 64 + x * 4);
#pragma unroll
      for (int r = 0; r < MINE; r++) {
        float weight = weights[(y * MINE + r) * WEIGHTS_PITCH + j];
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) o[r][c][i] += weight * value[c].at[i];
      }
    }
    __syncwarp();
  }
  wait_async<0>();
#pragma unroll
  for (int r = 0; r < MINE; r++) {
    int row = first_row + y * MINE + r;
    float sum = lanes_sum<ACROSS>(sums[r]), inverse = sum > 0.f ? 1.f / sum : 0.f;
    if (row >= rows) continue;
    if (x == 0)
      lse[(static_cast<i64>(blockIdx.z) * gridDim.y + head) * rows + row] = sum > 0.f ? (maxima[r] + log2f(sum)) * LN_2 : -infinity();
    float* to_row = out + blockIdx.z * out_by.batch + head * out_by.head + row * out_by.row;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      Vector16<float> result;
#pragma unroll
      for (int i = 0; i < 4; i++) result.at[i] = o[r][c][i] * inverse;
      *reinterpret_cast<Vector16<float>*>(to_row + c * 64 + x * 4) = result;
    }
  }
}
}  // namespace floats

#define PREFILL_F32(D)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(floats::THREADS) prefill_f32_##D(                                                   \
      const float* q, const float* k, const float* v, float* out, float* lse, const int* starts, const int* blocks, i64 q_batch,   \
      i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 out_batch, i64 out_head,  \
      i64 out_row, int heads_per_kv, int rows, int keys, int left, int right, float scale) {                                       \
    floats::prefill<D>(q, k, v, out, lse, starts, blocks, {q_batch, q_head, q_row}, {k_batch, k_head, k_row},                      \
                       {v_batch, v_head, v_row}, {out_batch, out_head, out_row}, heads_per_kv, rows, keys, left, right, scale); \
  }                                                                                                                                 \
  KERNEL(prefill_f32_##D)
PREFILL_F32(64)
PREFILL_F32(128)
PREFILL_F32(256)
