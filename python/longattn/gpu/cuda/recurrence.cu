// Linear attention with gates, in chunks of 16 tokens, on matrix units; recurrence_f32.cu has the formulas.
//
// In the first kernel scores of a chunk are sums over channels of q_i k_j e^(G_i - G_j), j < i. As products of matrices they need a
// row r with e^(G_i - G_r) and e^(G_r - G_j) at most 1, so r between j and i. Tokens i and j differ in a highest bit, which i has:
// i with the bits below cleared is such a row. So each of the four bits takes one product of the 8 tokens without it and those
// with it, a warp each.
//
// In the second kernel a warp has 16 value channels, and the transposed state [16, D] of these in the registers of a product's
// result. All products are made transposed, so that results are the left sides of the next products as they are:
//
//   W = S K',  R = S Q' (scale e^G Q, e^G K transposed);  U = (V - W) T';  O = R + U P';  S <- S Diag(e^G_n) + U (e^(G_n - G) K)
//
// What goes into a product is rounded to the dtype of q; sums, states and the solve are float32. No exponent is positive.

namespace recurrence {
constexpr int CHUNK = 16, THREADS = 128, WARPS = THREADS / WARP, COLUMNS = 16 * WARPS;

// Where the first kernel leaves a chunk's parts, in bytes.
template <int DIM>
struct Parts {
  static constexpr int KEYS = 0;                              // e^G K [16, D]
  static constexpr int QUERIES = KEYS + 2 * CHUNK * DIM;      // scale e^G Q
  static constexpr int REMAINING = QUERIES + 2 * CHUNK * DIM;  // e^(G_n - G) K
  static constexpr int SOLVE = REMAINING + 2 * CHUNK * DIM;   // T [16, 16]
  static constexpr int SCORES = SOLVE + 2 * CHUNK * CHUNK;    // P [16, 16]
  static constexpr int DECAY = SCORES + 2 * CHUNK * CHUNK;    // e^G_n [D], float32
  static constexpr int SIZE = DECAY + 4 * DIM;
};

// Two neighbouring channels.
template <class T>
DEVICE void load_pair(const T* from, float& low, float& high) {
  u32 pair = *reinterpret_cast<const u32*>(from);
  low = low_of<T>(pair);
  high = high_of<T>(pair);
}

// Grid: chunks, value heads, batch.
template <class T, int DIM>
DEVICE void prepare(const T* q, const T* k, const float* g, const float* beta, u8* parts, Strides q_by, Strides k_by, Strides g_by,
                    i64 g_channel, Strides beta_by, int heads_per_key, int rows, float scale) {
  // Rows eight numbers longer: lanes that read one channel of eight rows meet different banks.
  constexpr int PITCH = DIM + 8;
  using At = Parts<DIM>;
  int first = blockIdx.x * CHUNK, count = min(CHUNK, rows - first), head = blockIdx.y, key_head = head / heads_per_key;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  DYNAMIC_SHARED(shared);
  T* keys = reinterpret_cast<T*>(shared);
  T* queries = keys + CHUNK * PITCH;
  float* sums = reinterpret_cast<float*>(queries + CHUNK * PITCH);  // G, in units of log 2
  float* products = sums + CHUNK * PITCH;                           // A
  float* scores = products + CHUNK * CHUNK;                         // P
  const T* from_q = q + blockIdx.z * q_by.batch + key_head * q_by.head;
  const T* from_k = k + blockIdx.z * k_by.batch + key_head * k_by.head;
  for (int i = threadIdx.x; i < CHUNK * DIM / 8; i += THREADS) {
    int row = i / (DIM / 8), piece = i % (DIM / 8);
    bool valid = row < count;
    copy_async(keys + row * PITCH + piece * 8, from_k + (valid ? (first + row) * k_by.row + piece * 8 : 0), valid);
    copy_async(queries + row * PITCH + piece * 8, from_q + (valid ? (first + row) * q_by.row + piece * 8 : 0), valid);
  }
  commit_async();
  const float* gates = g ? g + blockIdx.z * g_by.batch + head * g_by.head : nullptr;
  for (int d = threadIdx.x; d < DIM; d += THREADS) {
    float sum = 0.f;
    for (int row = 0; row < CHUNK; row++) {
      if (gates && row < count) sum += gates[(first + row) * g_by.row + d * g_channel] * LOG2_E;
      sums[row * PITCH + d] = sum;
    }
  }
  for (int i = threadIdx.x; i < CHUNK * CHUNK; i += THREADS) products[i] = scores[i] = 0.f;
  wait_async<0>();
  __syncthreads();

  i64 chunk = (static_cast<i64>(blockIdx.z) * gridDim.y + head) * gridDim.x + blockIdx.x;
  u8* to = parts + chunk * At::SIZE;
  const float* rates = beta ? beta + blockIdx.z * beta_by.batch + head * beta_by.head : nullptr;
  {
    int bit = 1 << warp;
    // Token of this lane's column: the group-th without the bit.
    int column = (group & ~(bit - 1)) << 1 | (group & (bit - 1)), middle = (column & ~(bit - 1)) + bit;
    float of_keys[4] = {}, of_queries[4] = {};
#pragma unroll 2
    for (int s = 0; s < DIM / 16; s++) {
      u32 left_keys[4] = {}, left_queries[4] = {}, right[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int d = 16 * s + 8 * half + 2 * in_group;
        float k0, k1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int row = group + 8 * i, between = row & ~(bit - 1);
          if (!(row & bit)) continue;
          float q0, q1, grown0 = exp2f(sums[row * PITCH + d] - sums[between * PITCH + d]);
          float grown1 = exp2f(sums[row * PITCH + d + 1] - sums[between * PITCH + d + 1]);
          load_pair(keys + row * PITCH + d, k0, k1);
          load_pair(queries + row * PITCH + d, q0, q1);
          left_keys[2 * half + i] = pair_of<T>(k0 * grown0, k1 * grown1);
          left_queries[2 * half + i] = pair_of<T>(q0 * grown0, q1 * grown1);
        }
        load_pair(keys + column * PITCH + d, k0, k1);
        right[half] = pair_of<T>(k0 * exp2f(sums[middle * PITCH + d] - sums[column * PITCH + d]),
                                 k1 * exp2f(sums[middle * PITCH + d + 1] - sums[column * PITCH + d + 1]));
      }
      multiply(of_keys, left_keys, right[0], right[1], T{});
      multiply(of_queries, left_queries, right[0], right[1], T{});
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int i = group + 8 * (e >> 1), c = 2 * in_group + (e & 1), j = (c & ~(bit - 1)) << 1 | (c & (bit - 1));
      if (!(i & bit) || i >> (warp + 1) != j >> (warp + 1)) continue;  // not this bit's
      scores[i * CHUNK + j] = of_queries[e] * scale;
      products[i * CHUNK + j] = rates && i < count ? of_keys[e] * rates[(first + i) * beta_by.row] : 0.f;
    }
  }
  {  // A token's score with itself: 8 lanes each.
    int row = threadIdx.x / 8;
    float sum = 0.f;
    for (int d = threadIdx.x % 8 * 2; d < DIM; d += 16) {
      float k0, k1, q0, q1;
      load_pair(keys + row * PITCH + d, k0, k1);
      load_pair(queries + row * PITCH + d, q0, q1);
      sum += k0 * q0 + k1 * q1;
    }
    sum = lanes_sum<8>(sum);
    if (threadIdx.x % 8 == 0) scores[row * CHUNK + row] = sum * scale;
  }
  for (int i = threadIdx.x; i < CHUNK * DIM / 2; i += THREADS) {
    int row = i / (DIM / 2), d = i % (DIM / 2) * 2;
    float k0, k1, q0, q1, last0 = sums[(CHUNK - 1) * PITCH + d], last1 = sums[(CHUNK - 1) * PITCH + d + 1];
    float sum0 = sums[row * PITCH + d], sum1 = sums[row * PITCH + d + 1], decay0 = exp2f(sum0), decay1 = exp2f(sum1);
    load_pair(keys + row * PITCH + d, k0, k1);
    load_pair(queries + row * PITCH + d, q0, q1);
    reinterpret_cast<u32*>(to + At::KEYS)[i] = pair_of<T>(k0 * decay0, k1 * decay1);
    reinterpret_cast<u32*>(to + At::QUERIES)[i] = pair_of<T>(q0 * scale * decay0, q1 * scale * decay1);
    reinterpret_cast<u32*>(to + At::REMAINING)[i] = pair_of<T>(k0 * exp2f(last0 - sum0), k1 * exp2f(last1 - sum1));
    if (row == CHUNK - 1) {
      reinterpret_cast<float*>(to + At::DECAY)[d] = decay0;
      reinterpret_cast<float*>(to + At::DECAY)[d + 1] = decay1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < CHUNK * CHUNK; i += THREADS) from_float(scores[i], reinterpret_cast<T*>(to + At::SCORES)[i]);
  if (threadIdx.x < CHUNK) {  // a column of the inverse each
    int c = threadIdx.x;
    float column[CHUNK], rate = rates ? (c < count ? rates[(first + c) * beta_by.row] : 0.f) : 1.f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      float x = i == c ? 1.f : 0.f;
#pragma unroll
      for (int j = 0; j < i; j++) x -= products[i * CHUNK + j] * column[j];
      column[i] = x;
      from_float(x * rate, reinterpret_cast<T*>(to + At::SOLVE)[i * CHUNK + c]);
    }
  }
}

// Left side of a product from a result [16, 16].
template <class T>
DEVICE void as_left(u32 (&left)[4], const float (&a)[4], const float (&b)[4]) {
  left[0] = pair_of<T>(a[0], a[1]);
  left[1] = pair_of<T>(a[2], a[3]);
  left[2] = pair_of<T>(b[0], b[1]);
  left[3] = pair_of<T>(b[2], b[3]);
}
// d[16, 16] += left[16, 16] times the transpose of a tile's channels 16 step .. 16 step + 16, [16, 16].
template <class T, int DIM>
DEVICE void multiply_transposed(float (&d)[2][4], const u32 (&left)[4], const Tile<T, DIM>& tile, int step, int lane) {
  u32 right[4];
  load_matrices(right, tile.piece((lane & 7) + ((lane >> 4) << 3), 2 * step + ((lane >> 3) & 1)));
  multiply(d[0], left, right[0], right[1], T{});
  multiply(d[1], left, right[2], right[3], T{});
}

// `by_pieces`: rows of v are aligned to 16 bytes, and a multiple of them. Grid: value channels / 64, value heads, batch.
template <class T, int DIM>
DEVICE void carry(const u8* parts, const T* v, T* out, const float* initial, float* state, Strides v_by, Strides out_by, int rows,
                  int value_dim, int delta, int by_pieces) {
  using At = Parts<DIM>;
  constexpr int STAGE = At::SIZE + 2 * CHUNK * COLUMNS;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  int head = blockIdx.y, first_column = blockIdx.x * COLUMNS, chunks = (rows + CHUNK - 1) / CHUNK;
  DYNAMIC_SHARED(shared);  // two stages: the next chunk's parts and values arrive while this one's are used
  i64 of_head = static_cast<i64>(blockIdx.z) * gridDim.y + head;
  const u8* all_parts = parts + of_head * chunks * At::SIZE;
  const T* values = v + blockIdx.z * v_by.batch + head * v_by.head;
  T* to = out + blockIdx.z * out_by.batch + head * out_by.head;

  auto tile_at = [&](int chunk, int at) { return reinterpret_cast<T*>(shared + chunk % 2 * STAGE + at); };
  auto fetch = [&](int chunk) {
    const u8* from = all_parts + static_cast<i64>(chunk) * At::SIZE;
#pragma unroll
    for (int part = At::KEYS; part < At::SOLVE; part += 2 * CHUNK * DIM) {
      Tile<T, DIM> tile{tile_at(chunk, part)};
      for (int i = threadIdx.x; i < CHUNK * DIM / 8; i += THREADS)
        copy_async(tile.piece(i / (DIM / 8), i % (DIM / 8)), from + part + 16 * i, true);
    }
#pragma unroll
    for (int part = At::SOLVE; part < At::DECAY; part += 2 * CHUNK * CHUNK) {
      Tile<T, CHUNK> tile{tile_at(chunk, part)};
      if (threadIdx.x < CHUNK * 2) copy_async(tile.piece(threadIdx.x / 2, threadIdx.x % 2), from + part + 16 * threadIdx.x, true);
    }
    for (int i = threadIdx.x; i < DIM / 4; i += THREADS) copy_async(shared + chunk % 2 * STAGE + At::DECAY + 16 * i, from + At::DECAY + 16 * i, true);
    Tile<T, COLUMNS> tile{tile_at(chunk, At::SIZE)};
    for (int i = threadIdx.x; i < CHUNK * COLUMNS / 8; i += THREADS) {
      int row = i / (COLUMNS / 8), piece = i % (COLUMNS / 8), column = first_column + piece * 8;
      const T* from_row = values + (chunk * CHUNK + row) * v_by.row + column;
      bool valid = chunk * CHUNK + row < rows && column < value_dim;
      if (by_pieces) {
        copy_async(tile.piece(row, piece), valid ? from_row : values, valid);
      } else {
        for (int j = 0; j < 8; j++) tile.piece(row, piece)[j] = valid && column + j < value_dim ? from_row[j] : T{0};
      }
    }
  };

  // s[n] holds channels 8 n + 2 in_group + 0, 1 of value channels `group` and `group` + 8 of the warp.
  float s[DIM / 8][4];
  i64 of_state = of_head * DIM * value_dim;
  auto state_at = [&](int n, int j) { return of_state + static_cast<i64>(8 * n + 2 * in_group + (j & 1)) * value_dim; };
  auto column_of = [&](int j) { return first_column + warp * 16 + group + 8 * (j >> 1); };
#pragma unroll
  for (int n = 0; n < DIM / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[n][j] = initial && column_of(j) < value_dim ? initial[state_at(n, j) + column_of(j)] : 0.f;

  if (chunks) fetch(0);
  commit_async();
  for (int chunk = 0; chunk < chunks; chunk++) {
    wait_async<0>();
    __syncthreads();  // this chunk is there, the one before is used up
    if (chunk + 1 < chunks) fetch(chunk + 1);
    commit_async();
    Tile<T, DIM> keys{tile_at(chunk, At::KEYS)}, queries{tile_at(chunk, At::QUERIES)}, remaining{tile_at(chunk, At::REMAINING)};
    Tile<T, CHUNK> solve{tile_at(chunk, At::SOLVE)}, scores{tile_at(chunk, At::SCORES)};
    const float* decay = reinterpret_cast<const float*>(tile_at(chunk, At::DECAY));

    float held[2][4] = {}, result[2][4] = {}, update[2][4] = {};
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
      u32 left[4];
      as_left<T>(left, s[2 * step], s[2 * step + 1]);
      if (delta) multiply_transposed(held, left, keys, step, lane);
      multiply_transposed(result, left, queries, step, lane);
    }
    u32 value[4], left[4];
    load_matrices_transposed(value, (Tile<T, COLUMNS>{tile_at(chunk, At::SIZE)}.piece(lane & 15, 2 * warp + (lane >> 4))));
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        held[n][2 * i] = low_of<T>(value[2 * i + n]) - held[n][2 * i];
        held[n][2 * i + 1] = high_of<T>(value[2 * i + n]) - held[n][2 * i + 1];
      }
    as_left<T>(left, held[0], held[1]);
    if (delta) {
      multiply_transposed(update, left, solve, 0, lane);
      as_left<T>(left, update[0], update[1]);
    }
    multiply_transposed(result, left, scores, 0, lane);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int row = chunk * CHUNK + 8 * n + 2 * in_group + (j & 1);
        if (row < rows && column_of(j) < value_dim) from_float(result[n][j], to[row * out_by.row + column_of(j)]);
      }
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
      u32 right[4];
      load_matrices_transposed(right, remaining.piece(lane & 15, 2 * step + (lane >> 4)));
#pragma unroll
      for (int p = 0; p < 2; p++) {
        int n = 2 * step + p;
#pragma unroll
        for (int j = 0; j < 4; j++) s[n][j] *= decay[8 * n + 2 * in_group + (j & 1)];
        multiply(s[n], left, right[2 * p], right[2 * p + 1], T{});
      }
    }
  }
  wait_async<0>();
#pragma unroll
  for (int n = 0; n < DIM / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (column_of(j) < value_dim) state[state_at(n, j) + column_of(j)] = s[n][j];
}
}  // namespace recurrence

#define RECURRENCE(T, D)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(recurrence::THREADS) recurrence_prepare_##T##_##D(                                   \
      const T* q, const T* k, const float* g, const float* beta, u8* parts, i64 q_batch, i64 q_head, i64 q_row, i64 k_batch,        \
      i64 k_head, i64 k_row, i64 g_batch, i64 g_head, i64 g_row, i64 g_channel, i64 beta_batch, i64 beta_head, i64 beta_row,        \
      int heads_per_key, int rows, float scale) {                                                                                   \
    recurrence::prepare<T, D>(q, k, g, beta, parts, {q_batch, q_head, q_row}, {k_batch, k_head, k_row}, {g_batch, g_head, g_row},   \
                              g_channel, {beta_batch, beta_head, beta_row}, heads_per_key, rows, scale);                            \
  }                                                                                                                                  \
  KERNEL(recurrence_prepare_##T##_##D)                                                                                              \
  extern "C" __global__ void __launch_bounds__(recurrence::THREADS) recurrence_carry_##T##_##D(                                     \
      const u8* parts, const T* v, T* out, const float* initial, float* state, i64 v_batch, i64 v_head, i64 v_row,                  \
      i64 out_batch, i64 out_head, i64 out_row, int rows, int value_dim, int delta, int by_pieces) {                                \
    recurrence::carry<T, D>(parts, v, out, initial, state, {v_batch, v_head, v_row}, {out_batch, out_head, out_row}, rows,          \
                            value_dim, delta, by_pieces);                                                                           \
  }                                                                                                                                  \
  KERNEL(recurrence_carry_##T##_##D)
#define RECURRENCE_DIMS(T) RECURRENCE(T, 64) RECURRENCE(T, 128) RECURRENCE(T, 256)
RECURRENCE_DIMS(f16)
RECURRENCE_DIMS(bf16)
