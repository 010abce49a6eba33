// Linear attention with gates, in chunks of 16 tokens, in float32 throughout; recurrence.cu is for numbers of 16 bits.
//
//   S_t = Diag(e^g_t) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - (Diag(e^g_t) S_{t-1})^T k_t) or v_t,   o_t = scale S_t^T q_t
//
// with one log gate a channel or a head (a stride of 0 makes the second the first). Two kernels. The first goes over all chunks side by
// side and prepares what does not need the state; with G the running sum of g within the chunk, n its last row:
//
//   A_ij = beta_i sum_d k_i k_j e^(G_i - G_j), j < i;   T = (I + A)^-1 Diag(beta);   P_ij = scale sum_d q_i k_j e^(G_i - G_j), j <= i
//
// The second carries the state from chunk to chunk, a block for each head and 32 value channels:
//
//   U = T (V - (e^G K) S);   O = scale (e^G Q) S + P U;   S <- Diag(e^G_n) S + (e^(G_n - G) K)^T U
//
// No exponent is positive.

namespace recurrence {
constexpr int CHUNK = 16, THREADS = 128, COLUMNS = 32, WARPS = THREADS / WARP;

// Where the first kernel leaves a chunk's parts, in floats.
template <int DIM>
struct Parts {
  static constexpr int SOLVE = 0;                        // T [16, 16]
  static constexpr int SCORES = CHUNK * CHUNK;           // P [16, 16]
  static constexpr int DECAY = 2 * CHUNK * CHUNK;        // e^G_n [D]
  static constexpr int KEYS = DECAY + DIM;               // e^G K [16, D]
  static constexpr int QUERIES = KEYS + CHUNK * DIM;     // scale e^G Q
  static constexpr int REMAINING = QUERIES + CHUNK * DIM;  // e^(G_n - G) K
  static constexpr int SIZE = REMAINING + CHUNK * DIM;
};

// Grid: chunks, value heads, batch.
template <int DIM>
DEVICE void prepare(const float* q, const float* k, const float* g, const float* beta, float* parts, Strides q_by, Strides k_by, Strides g_by,
                    i64 g_channel, Strides beta_by, int heads_per_key, int rows, float scale) {
  constexpr int PITCH = DIM + 1;
  using At = Parts<DIM>;
  int first = blockIdx.x * CHUNK, count = min(CHUNK, rows - first), head = blockIdx.y, key_head = head / heads_per_key;
  DYNAMIC_SHARED(shared);
  float* keys = reinterpret_cast<float*>(shared);
  float* queries = keys + CHUNK * PITCH;
  float* sums = queries + CHUNK * PITCH;  // G
  float* products = sums + CHUNK * PITCH;  // A
  const float* from_q = q + blockIdx.z * q_by.batch + key_head * q_by.head;
  const float* from_k = k + blockIdx.z * k_by.batch + key_head * k_by.head;
  for (int i = threadIdx.x; i < CHUNK * DIM; i += THREADS) {
    int row = i / DIM, d = i % DIM;
    bool valid = row < count;
    keys[row * PITCH + d] = valid ? from_k[(first + row) * k_by.row + d] : 0.f;
    queries[row * PITCH + d] = valid ? from_q[(first + row) * q_by.row + d] * scale : 0.f;
  }
  const float* gates = g ? g + blockIdx.z * g_by.batch + head * g_by.head : nullptr;
  for (int d = threadIdx.x; d < DIM; d += THREADS) {
    float sum = 0.f;
    for (int row = 0; row < CHUNK; row++) {
      if (gates && row < count) sum += gates[(first + row) * g_by.row + d * g_channel];
      sums[row * PITCH + d] = sum;
    }
  }
  __syncthreads();

  i64 chunk = (static_cast<i64>(blockIdx.z) * gridDim.y + head) * gridDim.x + blockIdx.x;
  float* to = parts + chunk * At::SIZE;
  const float* rates = beta ? beta + blockIdx.z * beta_by.batch + head * beta_by.head : nullptr;
  for (int pair = threadIdx.x; pair < CHUNK * CHUNK; pair += THREADS) {
    int i = pair / CHUNK, j = pair % CHUNK;
    float of_keys = 0.f, of_queries = 0.f;
    if (j <= i) {
      for (int d = 0; d < DIM; d++) {
        float weighed = keys[j * PITCH + d] * __expf(sums[i * PITCH + d] - sums[j * PITCH + d]);
        of_keys += keys[i * PITCH + d] * weighed;
        of_queries += queries[i * PITCH + d] * weighed;
      }
    }
    to[At::SCORES + pair] = of_queries;
    products[pair] = rates && j < i && i < count ? of_keys * rates[(first + i) * beta_by.row] : 0.f;
  }
  for (int i = threadIdx.x; i < CHUNK * DIM; i += THREADS) {
    int row = i / DIM, d = i % DIM;
    float sum = sums[row * PITCH + d], last = sums[(CHUNK - 1) * PITCH + d];
    to[At::KEYS + i] = keys[row * PITCH + d] * __expf(sum);
    to[At::QUERIES + i] = queries[row * PITCH + d] * __expf(sum);
    to[At::REMAINING + i] = keys[row * PITCH + d] * __expf(last - sum);
    if (row == 0) to[At::DECAY + d] = __expf(last);
  }
  __syncthreads();
  if (threadIdx.x < CHUNK) {  // a column of the inverse each
    int c = threadIdx.x;
    float column[CHUNK], rate = rates ? (c < count ? rates[(first + c) * beta_by.row] : 0.f) : 1.f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      float x = i == c ? 1.f : 0.f;
#pragma unroll
      for (int j = 0; j < i; j++) x -= products[i * CHUNK + j] * column[j];
      column[i] = x;
      to[At::SOLVE + i * CHUNK + c] = x * rate;
    }
  }
}

// Grid: value channels / 32, value heads, batch.
template <int DIM>
DEVICE void carry(const float* parts, const float* v, float* out, const float* initial, float* state, Strides v_by, Strides out_by, int rows,
                  int value_dim, int delta) {
  using At = Parts<DIM>;
  constexpr int MINE = DIM / WARPS;  // rows of the state that a thread holds, of one column
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = blockIdx.y, column = blockIdx.x * COLUMNS + lane;
  bool valid = column < value_dim;
  int chunks = (rows + CHUNK - 1) / CHUNK;
  DYNAMIC_SHARED(shared);
  float* stages = reinterpret_cast<float*>(shared);  // two, the next chunk's parts arrive while this one's are used
  float* reads = stages + 2 * At::SIZE;              // [warps, 2, 16, 32]: keys' and queries' part of S
  float* updates = reads + WARPS * 2 * CHUNK * COLUMNS;  // [16, 32]: V - (e^G K) S, then U
  i64 of_head = static_cast<i64>(blockIdx.z) * gridDim.y + head;
  const float* all_parts = parts + of_head * chunks * At::SIZE;
  const float* values = v + blockIdx.z * v_by.batch + head * v_by.head;
  float* to = out + blockIdx.z * out_by.batch + head * out_by.head;

  float s[MINE];
  i64 of_state = of_head * DIM * value_dim;
#pragma unroll
  for (int r = 0; r < MINE; r++)
    s[r] = initial && valid ? initial[of_state + static_cast<i64>(warp * MINE + r) * value_dim + column] : 0.f;

  auto fetch = [&](int chunk) {
    for (int i = threadIdx.x; i < At::SIZE / 4; i += THREADS)
      copy_async(stages + chunk % 2 * At::SIZE + 4 * i, all_parts + static_cast<i64>(chunk) * At::SIZE + 4 * i, true);
  };
  if (chunks) fetch(0);
  commit_async();
  for (int chunk = 0; chunk < chunks; chunk++) {
    const float* part = stages + chunk % 2 * At::SIZE;
    wait_async<0>();
    __syncthreads();  // this chunk is there, the one before is used up
    if (chunk + 1 < chunks) fetch(chunk + 1);
    commit_async();
    int first = chunk * CHUNK;
    for (int i = 0; i < CHUNK; i++) {
      float of_key = 0.f, of_query = 0.f;
#pragma unroll
      for (int r = 0; r < MINE; r += 4) {
        Vector16<float> a = load16(part + At::KEYS + i * DIM + warp * MINE + r);
        Vector16<float> b = load16(part + At::QUERIES + i * DIM + warp * MINE + r);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          of_key += a.at[e] * s[r + e];
          of_query += b.at[e] * s[r + e];
        }
      }
      reads[((warp * 2) * CHUNK + i) * COLUMNS + lane] = of_key;
      reads[((warp * 2 + 1) * CHUNK + i) * COLUMNS + lane] = of_query;
    }
    __syncthreads();
    for (int i = warp; i < CHUNK; i += WARPS) {
      float x = valid && first + i < rows ? values[(first + i) * v_by.row + column] : 0.f;
      if (delta)
        for (int w = 0; w < WARPS; w++) x -= reads[((w * 2) * CHUNK + i) * COLUMNS + lane];
      updates[i * COLUMNS + lane] = x;
    }
    __syncthreads();
    float solved[CHUNK / WARPS];
#pragma unroll
    for (int n = 0; n < CHUNK / WARPS; n++) {
      int i = warp + n * WARPS;
      float x = delta ? 0.f : updates[i * COLUMNS + lane];
      if (delta)
        for (int j = 0; j <= i; j++) x += part[At::SOLVE + i * CHUNK + j] * updates[j * COLUMNS + lane];
      solved[n] = x;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < CHUNK / WARPS; n++) updates[(warp + n * WARPS) * COLUMNS + lane] = solved[n];
    __syncthreads();
    for (int i = warp; i < CHUNK; i += WARPS) {
      float x = 0.f;
      for (int w = 0; w < WARPS; w++) x += reads[((w * 2 + 1) * CHUNK + i) * COLUMNS + lane];
      for (int j = 0; j <= i; j++) x += part[At::SCORES + i * CHUNK + j] * updates[j * COLUMNS + lane];
      if (valid && first + i < rows) to[(first + i) * out_by.row + column] = x;
    }
#pragma unroll
    for (int r = 0; r < MINE; r += 4) {
      Vector16<float> decay = load16(part + At::DECAY + warp * MINE + r);
#pragma unroll
      for (int e = 0; e < 4; e++) s[r + e] *= decay.at[e];
    }
    for (int i = 0; i < CHUNK; i++) {
      float u = updates[i * COLUMNS + lane];
#pragma unroll
      for (int r = 0; r < MINE; r += 4) {
        Vector16<float> key = load16(part + At::REMAINING + i * DIM + warp * MINE + r);
#pragma unroll
        for (int e = 0; e < 4; e++) s[r + e] += key.at[e] * u;
      }
    }
  }
  wait_async<0>();
  if (valid)
#pragma unroll
    for (int r = 0; r < MINE; r++) state[of_state + static_cast<i64>(warp * MINE + r) * value_dim + column] = s[r];
}
}  // namespace recurrence

#define RECURRENCE(D)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(recurrence::THREADS) recurrence_prepare_f32_##D(                                     \
      const float* q, const float* k, const float* g, const float* beta, float* parts, i64 q_batch, i64 q_head, i64 q_row,          \
      i64 k_batch, i64 k_head, i64 k_row, i64 g_batch, i64 g_head, i64 g_row, i64 g_channel, i64 beta_batch, i64 beta_head,         \
      i64 beta_row, int heads_per_key, int rows, float scale) {                                                                     \
    recurrence::prepare<D>(q, k, g, beta, parts, {q_batch, q_head, q_row}, {k_batch, k_head, k_row}, {g_batch, g_head, g_row},      \
                           g_channel, {beta_batch, beta_head, beta_row}, heads_per_key, rows, scale);                               \
  }                                                                                                                                  \
  KERNEL(recurrence_prepare_f32_##D)                                                                                                \
  extern "C" __global__ void __launch_bounds__(recurrence::THREADS) recurrence_carry_f32_##D(                                       \
      const float* parts, const float* v, float* out, const float* initial, float* state, i64 v_batch, i64 v_head, i64 v_row,       \
      i64 out_batch, i64 out_head, i64 out_row, int rows, int value_dim, int delta) {                                               \
    recurrence::carry<D>(parts, v, out, initial, state, {v_batch, v_head, v_row}, {out_batch, out_head, out_row}, rows, value_dim, \
                         delta);                                                                                                    \
  }                                                                                                                                  \
  KERNEL(recurrence_carry_f32_##D)
RECURRENCE(64)
RECURRENCE(128)
RECURRENCE(256)
