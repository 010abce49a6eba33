// Linear attention with gates, a few tokens at a time from a state: recurrence_f32.cu has the formulas. Everything is float32; inputs and
// output may have 16 bits.
//
// What counts is the way of the state through the device's memory, once in and once out, by 16 bytes. A block has 32 value channels: a
// thread 4 of them and every 16th row, all in registers, so that all its loads are under way at once. With S' the decayed state,
//
//   u = beta (v - S'^T k) or v,   o = scale (S'^T q + (k q) u),   S = S' + k u^T
//
// so both sums over rows, and k q, are made in one pass and meet at one barrier a token.

namespace recurrence_step {
constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int ACROSS = 8, COLUMNS = 4 * ACROSS;             // lanes, and their channels
constexpr int DOWN = WARP / ACROSS, STRIDE = WARPS * DOWN;  // rows of a warp at a time, of all

// Sum over a warp's rows.
DEVICE float rows_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step >= ACROSS; step >>= 1) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// What the warps sum for each other: [WARPS, 32] by keys and by queries, and [WARPS] of keys with queries.
constexpr int BY_QUERY = WARPS * COLUMNS, OF_BOTH = 2 * BY_QUERY, SUMS = OF_BOTH + 4;
static_assert(WARPS == 4, "a vector holds a number of each warp");

// `by_pieces`: rows of the states are aligned to 16 bytes. Grid: value channels / 32, value heads, batch.
template <class T, int DIM>
DEVICE void steps(const T* q, const T* k, const float* g, const float* beta, const T* v, T* out, const float* initial, float* state,
                  Strides q_by, Strides k_by, Strides g_by, i64 g_channel, Strides beta_by, Strides v_by, Strides out_by, int heads_per_key,
                  int rows, int value_dim, int by_pieces, float scale) {
  constexpr int MINE = DIM / STRIDE;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = blockIdx.y, batch = blockIdx.z, key_head = head / heads_per_key;
  int across = lane % ACROSS * 4, first_row = warp * DOWN + lane / ACROSS, column = blockIdx.x * COLUMNS + across;
  i64 of_thread = ((static_cast<i64>(batch) * gridDim.y + head) * DIM + first_row) * value_dim + column;
  i64 next = static_cast<i64>(STRIDE) * value_dim;  // from one of its rows to the next
  int columns = max(min(value_dim - column, 4), 0);  // of this thread
  bool whole = by_pieces && columns > 0;

  Vector16<float> s[MINE] = {};
  if (initial) {
    const float* from = initial + of_thread;
    if (whole) {
#pragma unroll
      for (int r = 0; r < MINE; r++, from += next) s[r] = load16(from);
    } else {
#pragma unroll
      for (int r = 0; r < MINE; r++, from += next)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < columns) s[r].at[e] = from[e];
    }
  }

  DYNAMIC_SHARED(shared);
  float* keys = reinterpret_cast<float*>(shared);  // of all tokens, as what follows
  float* queries = keys + rows * DIM;              // times the scale
  float* decays = queries + rows * DIM;
  float* sums = decays + rows * DIM;  // two, so that a token's are read while the next one's are written
  const T* from_q = q + batch * q_by.batch + key_head * q_by.head;
  const T* from_k = k + batch * k_by.batch + key_head * k_by.head;
  const float* gates = g ? g + batch * g_by.batch + head * g_by.head : nullptr;
  for (int i = threadIdx.x; i < rows * DIM; i += THREADS) {
    int row = i / DIM, d = i % DIM;
    keys[i] = to_float(from_k[row * k_by.row + d]);
    queries[i] = to_float(from_q[row * q_by.row + d]) * scale;
    decays[i] = gates ? __expf(gates[row * g_by.row + d * g_channel]) : 1.f;
  }
  const float* rates = beta ? beta + batch * beta_by.batch + head * beta_by.head : nullptr;
  const T* values = v + batch * v_by.batch + head * v_by.head + column;
  T* to = out + batch * out_by.batch + head * out_by.head + column;
  __syncthreads();

  for (int row = 0; row < rows; row++) {
    float update[4], by_key[4] = {}, by_query[4] = {}, both = 0.f, rate = rates ? rates[row * beta_by.row] : 1.f;
#pragma unroll
    for (int e = 0; e < 4; e++) update[e] = e < columns ? to_float(values[row * v_by.row + e]) : 0.f;
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      int at = row * DIM + first_row + r * STRIDE;
      float key = keys[at], query = queries[at], decay = decays[at];
      both += key * query;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[r].at[e] *= decay;
        by_key[e] += key * s[r].at[e];
        by_query[e] += query * s[r].at[e];
      }
    }
    float* of_token = sums + row % 2 * SUMS;
    both = rows_sum(both);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      by_key[e] = rows_sum(by_key[e]);
      by_query[e] = rows_sum(by_query[e]);
    }
    if (lane < ACROSS) {
      *reinterpret_cast<Vector16<float>*>(of_token + warp * COLUMNS + across) = {by_key[0], by_key[1], by_key[2], by_key[3]};
      *reinterpret_cast<Vector16<float>*>(of_token + BY_QUERY + warp * COLUMNS + across) = {by_query[0], by_query[1], by_query[2], by_query[3]};
      if (lane == 0) of_token[OF_BOTH + warp] = both;
    }
    __syncthreads();
    Vector16<float> of_keys = {}, of_queries = {}, of_both = load16(of_token + OF_BOTH);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      Vector16<float> a = load16(of_token + w * COLUMNS + across), b = load16(of_token + BY_QUERY + w * COLUMNS + across);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        of_keys.at[e] += a.at[e];
        of_queries.at[e] += b.at[e];
      }
    }
    both = of_both.at[0] + of_both.at[1] + of_both.at[2] + of_both.at[3];
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (rates) update[e] = rate * (update[e] - of_keys.at[e]);
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      float key = keys[row * DIM + first_row + r * STRIDE];
#pragma unroll
      for (int e = 0; e < 4; e++) s[r].at[e] += key * update[e];
    }
    if (threadIdx.x < ACROSS) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < columns) from_float(of_queries.at[e] + both * update[e], to[row * out_by.row + e]);
    }
  }

  float* left = state + of_thread;
  if (whole) {
#pragma unroll
    for (int r = 0; r < MINE; r++, left += next) *reinterpret_cast<Vector16<float>*>(left) = s[r];
  } else {
#pragma unroll
    for (int r = 0; r < MINE; r++, left += next)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < columns) left[e] = s[r].at[e];
  }
}
}  // namespace recurrence_step

#define RECURRENCE_STEP(T, NAME, D)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(recurrence_step::THREADS) recurrence_step_##NAME##_##D(                                 \
      const T* q, const T* k, const float* g, const float* beta, const T* v, T* out, const float* initial, float* state, i64 q_batch,  \
      i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 g_batch, i64 g_head, i64 g_row, i64 g_channel, i64 beta_batch,    \
      i64 beta_head, i64 beta_row, i64 v_batch, i64 v_head, i64 v_row, i64 out_batch, i64 out_head, i64 out_row, int heads_per_key,    \
      int rows, int value_dim, int by_pieces, float scale) {                                                                          \
    recurrence_step::steps<T, D>(q, k, g, beta, v, out, initial, state, {q_batch, q_head, q_row}, {k_batch, k_head, k_row},           \
                                 {g_batch, g_head, g_row}, g_channel, {beta_batch, beta_head, beta_row}, {v_batch, v_head, v_row},    \
                                 {out_batch, out_head, out_row}, heads_per_key, rows, value_dim, by_pieces, scale);                  \
  }                                                                                                                                    \
  KERNEL(recurrence_step_##NAME##_##D)
#define RECURRENCE_STEP_DIMS(T, NAME) RECURRENCE_STEP(T, NAME, 64) RECURRENCE_STEP(T, NAME, 128) RECURRENCE_STEP(T, NAME, 256)
RECURRENCE_STEP_DIMS(float, f32)
RECURRENCE_STEP_DIMS(f16, f16)
RECURRENCE_STEP_DIMS(bf16, bf16)
