// Attention of a few query rows over long keys: see decode.cuh. A warp goes through keys of its own, so that no barrier but the warp's
// own stands in its loop; the four warps' results are merged at the end.

// ---- matrix products: 16-bit numbers, up to 16 rows ----
// Of copies; wide rows have fewer, for devices with less shared memory.
template <int DIM>
constexpr int DECODE_STAGES = DIM > 128 ? 2 : 3;
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
DEVICE void decode_matrices(const T* q, const T* k, const T* v, const int* listed, const Lengths& lengths, float* partial, float* lse,
                            Strides k_by, Strides v_by, int most, int split_keys, int all_rows, int positions, int left, int right,
                            float scale, const ScoreOptions& options) {
  constexpr int STEPS = DIM / 16;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  const DecodePart<16, DIM> part(lengths, most, split_keys, all_rows, positions, left, right);
  const T* keys = k + blockIdx.z * k_by.batch + part.head * k_by.head;
  const T* values = v + blockIdx.z * v_by.batch + part.head * v_by.head;
  const T* queries = q + part.first_row * DIM;
  const int* list = listed ? listed + part.batch_head * most : nullptr;

  // The queries lie where the first warp's last stage will be, whose copies start in the loop.
  DYNAMIC_SHARED(shared);
  constexpr int STAGES = DECODE_STAGES<DIM>, STAGE = 2 * DECODE_KEYS * DIM, STRIDE = DECODE_WARPS * DECODE_KEYS;
  T* stages = reinterpret_cast<T*>(shared) + warp * STAGES * STAGE;
  Tile<T, DIM> q_tile{reinterpret_cast<T*>(shared) + (STAGES - 1) * STAGE};
  for (int i = threadIdx.x; i < 16 * (DIM / 8); i += DECODE_THREADS) {
    int row = i / (DIM / 8), piece = i % (DIM / 8);
    bool valid = row < part.rows;
    copy_async(q_tile.piece(row, piece), queries + (valid ? row * DIM + piece * 8 : 0), valid);
  }
  commit_async();
  auto fetch = [&](int stage, int at) {
    if (at < part.to) {
      decode_load(Tile<T, DIM>{stages + stage * STAGE}, keys, k_by.row, list, at, part.to, lane);
      decode_load(Tile<T, DIM>{stages + stage * STAGE + DECODE_KEYS * DIM}, values, v_by.row, list, at, part.to, lane);
    }
    commit_async();
  };
  int first = part.from + warp * DECODE_KEYS;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(s, first + s * STRIDE);
  wait_async<STAGES - 1>();
  __syncthreads();  // the queries are there
  u32 q_parts[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; s++) load_matrices(q_parts[s], q_tile.piece(lane & 15, 2 * s + (lane >> 4)));
  __syncthreads();  // and in registers

  float o[DIM / 8][4], maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < DIM / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) o[i][j] = 0.f;
  int sees_from[2], sees_to[2];
  ScoreRow of_row[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sees_from[i] = part.sees_from(group + 8 * i);
    sees_to[i] = part.sees_to(group + 8 * i);
    of_row[i] = part.scores(options, scale, group + 8 * i);
  }

  int stage = 0;
  for (int at = first; at < part.to; at += STRIDE) {
    fetch(stage == 0 ? STAGES - 1 : stage - 1, at + (STAGES - 1) * STRIDE);
    wait_async<STAGES - 1>();
    __syncwarp();
    Tile<T, DIM> k_tile{stages + stage * STAGE}, v_tile{stages + stage * STAGE + DECODE_KEYS * DIM};

    float scores[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      u32 loaded[4];
      load_matrices(loaded, k_tile.piece((lane & 7) + ((lane >> 4) << 3), 2 * s + ((lane >> 3) & 1)));
      multiply(scores[0], q_parts[s], loaded[0], loaded[1], T{});
      multiply(scores[1], q_parts[s], loaded[2], loaded[3], T{});
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float row[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        int key = at + n / 2 * 8 + in_group * 2 + n % 2;
        bool seen = key >= sees_from[i] && key < sees_to[i];
        row[n] = seen ? score_of(options, of_row[i], scores[n / 2][2 * i + n % 2], key) : -infinity();
      }
      float shrink = softmax_step<4>(row, maxima[i], sums[i]);
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < 4; n++) scores[n / 2][2 * i + n % 2] = row[n];
    }
    u32 weights[4] = {pair_of<T>(scores[0][0], scores[0][1]), pair_of<T>(scores[0][2], scores[0][3]),
                      pair_of<T>(scores[1][0], scores[1][1]), pair_of<T>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
      u32 loaded[4];
      load_matrices_transposed(loaded, v_tile.piece(lane & 15, 2 * d + (lane >> 4)));
      multiply(o[2 * d], weights, loaded[0], loaded[1], T{});
      multiply(o[2 * d + 1], weights, loaded[2], loaded[3], T{});
    }
    __syncwarp();  // the stage is free
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  wait_async<0>();
  __syncthreads();  // results take the stages' place

  float* to_maxima = reinterpret_cast<float*>(shared);
  float* to_sums = to_maxima + 16 * DECODE_WARPS;
  float* outputs = to_sums + 16 * DECODE_WARPS;
  u32 again = 0;  // rows whose sums are no numbers
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = lanes_sum<4>(sums[i]);
    bool numbers = true;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) numbers = numbers && finite(o[d][2 * i]) && finite(o[d][2 * i + 1]);
    u32 lanes = __ballot_sync(ALL_LANES, group + 8 * i < part.rows && !numbers);
#pragma unroll
    for (int g = 0; g < 8; g++) again |= (lanes >> 4 * g & 15 ? 1u : 0u) << (g + 8 * i);
    int to = (group + 8 * i) * DECODE_WARPS + warp;
    if (in_group == 0) {
      to_maxima[to] = maxima[i];
      to_sums[to] = sum;
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int j = 0; j < 2; j++) outputs[to * DIM + d * 8 + in_group * 2 + j] = o[d][2 * i + j];
  }
  if (again) {
    __syncwarp();
    for (int r = 0; r < part.rows; r++) {
      if (!(again >> r & 1)) continue;
      int to = r * DECODE_WARPS + warp, until = part.sees_to(r);
      float query[DIM / WARP], sum[DIM / WARP] = {}, most = to_maxima[to];
      load_row<DIM>(query, queries + r * DIM);
      ScoreRow row = part.scores(options, scale, r);
      for (int at = first; at < until; at += STRIDE) {
        for (int key = max(at, part.sees_from(r)); key < min(at + DECODE_KEYS, until); key++) {
          i64 place = list ? list[key] : key;
          add_key<DIM>(sum, query, keys + place * k_by.row, values + place * v_by.row, most,
                       [&](float product) { return score_of(options, row, product, key); });
        }
      }
#pragma unroll
      for (int i = 0; i < DIM / WARP; i++) outputs[to * DIM + lane + WARP * i] = sum[i];
    }
  }
  part.merge(to_maxima, to_sums, outputs, DECODE_WARPS, options, partial, lse);
}

// ---- products of floats, ROWS rows ----
template <int DIM, int ROWS>
DEVICE void decode_floats(const float* q, const float* k, const float* v, const int* listed, const Lengths& lengths, float* partial,
                          float* lse, Strides k_by, Strides v_by, int most, int split_keys, int all_rows, int positions, int left,
                          int right, float scale, const ScoreOptions& options) {
  // A key is read by LANES lanes, PER_LANE vectors of 4 each.
  constexpr int PER_LANE = DIM > 128 ? DIM / 128 : 1, LANES = DIM / 4 / PER_LANE, KEYS = WARP / LANES, PARTS = DECODE_WARPS * KEYS;
  static_assert(LANES <= WARP && WARP % LANES == 0, "lanes of a key");
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, key = lane / LANES, in_key = lane % LANES;
  const DecodePart<ROWS, DIM> block(lengths, most, split_keys, all_rows, positions, left, right);
  const float* keys = k + blockIdx.z * k_by.batch + block.head * k_by.head;
  const float* values = v + blockIdx.z * v_by.batch + block.head * v_by.head;
  const int* list = listed ? listed + block.batch_head * most : nullptr;

  float query[ROWS][PER_LANE][4], o[ROWS][PER_LANE][4], maxima[ROWS], sums[ROWS];
  int sees_from[ROWS], sees_to[ROWS];
  ScoreRow of_row[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    maxima[r] = -infinity();
    sums[r] = 0.f;
    sees_from[r] = block.sees_from(r);
    sees_to[r] = block.sees_to(r);
    of_row[r] = block.scores(options, scale, r);
#pragma unroll
    for (int p = 0; p < PER_LANE; p++) {
      Vector16<float> x = load16(q + (block.first_row + min(r, block.rows - 1)) * DIM + (p * LANES + in_key) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        query[r][p][i] = x.at[i];
        o[r][p][i] = 0.f;
      }
    }
  }
  for (int at = block.from + warp * KEYS; at < block.to; at += PARTS) {
    int j = at + key;
    bool valid = j < block.to;
    i64 row = valid ? (list ? list[j] : j) : 0;
    Vector16<float> k_part[PER_LANE] = {}, v_part[PER_LANE] = {};
    if (valid) {
#pragma unroll
      for (int p = 0; p < PER_LANE; p++) {
        k_part[p] = load16(keys + row * k_by.row + (p * LANES + in_key) * 4);
        v_part[p] = load16(values + row * v_by.row + (p * LANES + in_key) * 4);
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
      if (j < sees_from[r] || j >= sees_to[r]) continue;
      score = score_of(options, of_row[r], score, j);
      if (SCORE_OPTIONS && score == -infinity()) continue;
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
  block.merge(to_maxima, to_sums, outputs, PARTS, options, partial, lse);
}

#define DECODE_MATRICES(T, D)                                                                               \
  extern "C" __global__ void __launch_bounds__(DECODE_THREADS) decode_##T##_##D(DECODE_ARGUMENTS(T, T)) { \
    decode_matrices<T, D>(DECODE_PASSED);                                                                   \
  }                                                                                                         \
  KERNEL(decode_##T##_##D)
#define DECODE_FLOATS(D, ROWS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(DECODE_THREADS) decode_f32_##D##_##ROWS(DECODE_ARGUMENTS(float, float)) { \
    decode_floats<D, ROWS>(DECODE_PASSED);                                                                                  \
  }                                                                                                                         \
  KERNEL(decode_f32_##D##_##ROWS)
DECODE_MATRICES(f16, 64)
DECODE_MATRICES(f16, 128)
DECODE_MATRICES(f16, 256)
DECODE_MATRICES(bf16, 64)
DECODE_MATRICES(bf16, 128)
DECODE_MATRICES(bf16, 256)
#if !SCORE_OPTIONS
DECODE_FLOATS(64, 1)
DECODE_FLOATS(128, 1)
DECODE_FLOATS(256, 1)
#endif
DECODE_FLOATS(64, 4)
DECODE_FLOATS(128, 4)
DECODE_FLOATS(256, 4)
