// Attention of many query rows in float32 throughout: for tests of gradients, small models, and whoever has such arrays.
//
// Patterns as in prefill.cuh; a block has 64 query rows, a tile 64 keys, taken 32 at a time. A thread has 8 rows, and every 16th
// key and channel: rows 8 y .. 8 y + 8, keys x + 16 i, channels 4 x + 64 i.

namespace floats {
constexpr int THREADS = 128, ROWS = 64, KEYS = 32, ACROSS = 16, MINE = 8;

// A row is four floats longer than it needs, so that rows that follow one another begin in different banks.
template <int DIM, int COUNT, class At>
DEVICE void load(float* to, const float* base, i64 stride, const At& at) {
  constexpr int PIECES = DIM / 4;
  for (int place = threadIdx.x; place < COUNT * PIECES; place += THREADS) {
    int row = place / PIECES, piece = place % PIECES;
    i64 from = at(row);
    copy_async(to + row * (DIM + 4) + piece * 4, base + (from >= 0 ? from * stride + piece * 4 : 0), from >= 0);
  }
}

template <int DIM, class Pattern>
DEVICE void prefill(const Pattern& pattern, const Operands<float>& in, const ScoreOptions& options, float scale, int batch, int head) {
  constexpr int PITCH = DIM + 4, CHANNELS = DIM / 64;
  int x = threadIdx.x % ACROSS, y = threadIdx.x / ACROSS;

  DYNAMIC_SHARED(shared);
  float* q_tile = reinterpret_cast<float*>(shared);
  float* k_tile = q_tile + ROWS * PITCH;
  float* v_tile = k_tile + KEYS * PITCH;
  float* weights = v_tile + KEYS * PITCH;  // [ROWS, KEYS + 4]
  constexpr int WEIGHTS_PITCH = KEYS + 4;
  load<DIM, ROWS>(q_tile, in.q, in.q_row, [&](int i) { return pattern.query(i); });
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
  for (int half = 2 * pattern.from; half < 2 * pattern.until; half++) {
    typename Pattern::Place place = pattern.at(half / 2);
    int first = half % 2 * KEYS;
    if (!pattern.reaches(place, first)) continue;
    auto at = [&](int i) { return pattern.key(place, first + i); };
    __syncthreads();  // the tile before is used up
    load<DIM, KEYS>(k_tile, in.k.first, in.k.stride, at);
    load<DIM, KEYS>(v_tile, in.v.first, in.v.stride, at);
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
      typename Pattern::Row sight = pattern.row(y * MINE + r);
      i64 query = pattern.query(y * MINE + r);
      ScoreRow of_row = score_row(options, scale, batch, head, query < 0 ? 0 : static_cast<int>(query), pattern.position(y * MINE + r));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int key = first + x + ACROSS * i;
        bool seen = pattern.sees(sight, place, key);
        scores[r][i] = seen ? score_of(options, of_row, scores[r][i], pattern.number(place, key)) : -infinity();
      }
      float shrink = softmax_step<ACROSS>(scores[r], maxima[r], sums[r]);
#pragma unroll
      for (int i = 0; i < 2; i++) weights[(y * MINE + r) * WEIGHTS_PITCH + x + ACROSS * i] = scores[r][i];
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
  float sink = sink_of(options, head);
  u32 again = 0;  // rows of the warp whose sums are no numbers
#pragma unroll
  for (int r = 0; r < MINE; r++) {
    i64 row = pattern.query(y * MINE + r);
    bool numbers = true;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) numbers = numbers && finite(o[r][c][i]);
    u32 lanes = __ballot_sync(ALL_LANES, row >= 0 && !numbers);
    again |= (lanes & 0xffff ? 1u : 0u) << r | (lanes >> 16 ? 1u : 0u) << (MINE + r);
    sums[r] = lanes_sum<ACROSS>(sums[r]);
    // The warp's weights are used up: their place tells all its lanes what a row has come to.
    if (x == 0) {
      weights[(y * MINE + r) * WEIGHTS_PITCH] = maxima[r];
      weights[(y * MINE + r) * WEIGHTS_PITCH + 1] = sums[r];
    }
    SoftmaxEnd end = softmax_end(maxima[r], sums[r], sink, row < 0 ? -infinity() : earlier_of(in.state_lse, row));
    if (row < 0) continue;
    if (x == 0) in.lse[row] = end.lse;
    i64 at = row * in.out_row;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      Vector16<float> result;
#pragma unroll
      for (int i = 0; i < 4; i++) result.at[i] = output_of(end, o[r][c][i], in.state, at + c * 64 + x * 4 + i);
      *reinterpret_cast<Vector16<float>*>(in.out + at + c * 64 + x * 4) = result;
    }
  }
  if (again == 0) return;
  __syncwarp();
  for (int r = 0; r < 2 * MINE; r++) {
    if (!(again >> r & 1)) continue;
    int at_row = threadIdx.x / WARP * 2 * MINE + r;
    const float* come_to = weights + at_row * WEIGHTS_PITCH;
    prefill_again<DIM>(pattern, in, options, scale, batch, head, at_row, come_to[0], come_to[1]);
  }
}
}  // namespace floats
