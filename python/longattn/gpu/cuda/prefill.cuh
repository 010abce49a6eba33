// Attention of many query rows on matrix units: 16 rows a warp, tiles of 64 keys, softmax on the way.
//
// Keys and values of a tile have one buffer each: values are fetched while scores are computed, the next keys while values are used.
// Which rows a block has, which tiles it goes over and what a row sees of them is the pattern's (Ranges, or a grid's).

constexpr int PREFILL_KEYS = LISTED_KEYS;

// ROWS rows into a tile; `at(i)`: where row i lies, in rows, or below 0 for zeros.
template <class T, int DIM, int ROWS, int THREADS, class At>
DEVICE void prefill_load(const Tile<T, DIM>& tile, const T* base, i64 stride, const At& at) {
  constexpr int PIECES = DIM / 8;
#pragma unroll 4
  for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
    int place = threadIdx.x + i * THREADS, row = place / PIECES, piece = place % PIECES;
    i64 from = at(row);
    copy_async(tile.piece(row, piece), base + (from >= 0 ? from * stride + piece * 8 : 0), from >= 0);
  }
}

template <class T, int DIM, int WARPS, class Pattern>
DEVICE void prefill(const Pattern& pattern, const Operands<T>& in, const ScoreOptions& options, float scale, int batch, int head) {
  constexpr int THREADS = WARPS * WARP, ROWS = WARPS * 16, STEPS = DIM / 16;
  constexpr bool KEEP_QUERIES = DIM <= 128;  // in registers; wider ones are loaded again for every tile
  using Place = typename Pattern::Place;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;

  DYNAMIC_SHARED(shared);
  Tile<T, DIM> q_tile{reinterpret_cast<T*>(shared)}, k_tile{q_tile.base + ROWS * DIM}, v_tile{k_tile.base + PREFILL_KEYS * DIM};
  auto fetch = [&](const Tile<T, DIM>& to, const T* base, i64 stride, const Place& place) {
    prefill_load<T, DIM, PREFILL_KEYS, THREADS>(to, base, stride, [&](int i) { return pattern.key(place, i); });
  };
  prefill_load<T, DIM, ROWS, THREADS>(q_tile, in.q, in.q_row, [&](int i) { return pattern.query(i); });
  if (pattern.from < pattern.until) fetch(k_tile, in.k, in.k_row, pattern.at(pattern.from));
  commit_async();

  float o[DIM / 8][4], maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.f, 0.f};
#pragma unroll
  for (int d = 0; d < DIM / 8; d++)
#pragma unroll
    for (int j = 0; j < 4; j++) o[d][j] = 0.f;
  typename Pattern::Row sight[2];
  ScoreRow of_row[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int r = warp * 16 + group + 8 * i;
    sight[i] = pattern.row(r);
    bool valid = pattern.query(r) >= 0;
    of_row[i] = score_row(options, scale, batch, head, valid ? static_cast<int>(pattern.query(r)) : 0, pattern.position(r));
  }
  u32 q_parts[KEEP_QUERIES ? STEPS : 1][4];

  for (int c = pattern.from; c < pattern.until; c++) {
    Place place = pattern.at(c);
    wait_async<0>();
    __syncthreads();  // these keys are there, the values before are used up
    fetch(v_tile, in.v, in.v_row, place);
    commit_async();
    if (KEEP_QUERIES && c == pattern.from) {
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
      float row[PREFILL_KEYS / 4];
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 4; n++) {
        int key = n / 2 * 8 + in_group * 2 + n % 2;
        float product = scores[n / 2][2 * i + n % 2];
        row[n] = pattern.sees(sight[i], place, key) ? score_of(options, of_row[i], product, pattern.number(place, key)) : -infinity();
      }
      float shrink = softmax_step<4>(row, maxima[i], sums[i]);
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 4; n++) scores[n / 2][2 * i + n % 2] = row[n];
    }
    wait_async<0>();
    __syncthreads();  // the values are there, the keys are used up
    if (c + 1 < pattern.until) fetch(k_tile, in.k, in.k_row, pattern.at(c + 1));
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

  float sink = sink_of(options, head);
  u32 again = 0;  // rows of the warp whose sums are no numbers
#pragma unroll
  for (int i = 0; i < 2; i++) {
    i64 row = pattern.query(warp * 16 + group + 8 * i);
    bool numbers = true;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) numbers = numbers && finite(o[d][2 * i]) && finite(o[d][2 * i + 1]);
    u32 lanes = __ballot_sync(ALL_LANES, row >= 0 && !numbers);
    sums[i] = lanes_sum<4>(sums[i]);
#pragma unroll
    for (int g = 0; g < 8; g++) again |= (lanes >> 4 * g & 15 ? 1u : 0u) << (g + 8 * i);
    SoftmaxEnd end = softmax_end(maxima[i], sums[i], sink, row < 0 ? -infinity() : earlier_of(in.state_lse, row));
    if (row < 0) continue;
    if (in_group == 0) in.lse[row] = end.lse;
    i64 at = row * in.out_row;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      int channel = d * 8 + in_group * 2;
      *reinterpret_cast<u32*>(in.out + at + channel) =
          pair_of<T>(output_of(end, o[d][2 * i], in.state, at + channel), output_of(end, o[d][2 * i + 1], in.state, at + channel + 1));
    }
  }
  if (again == 0) return;
  __syncwarp();
  for (int r = 0; r < 16; r++) {
    if (!(again >> r & 1)) continue;
    int at_row = warp * 16 + r, from = r % 8 * 4;
    float tops[2], totals[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      tops[i] = __shfl_sync(ALL_LANES, maxima[i], from);
      totals[i] = __shfl_sync(ALL_LANES, sums[i], from);
    }
    prefill_again<DIM>(pattern, in, options, scale, batch, head, at_row, r < 8 ? tops[0] : tops[1], r < 8 ? totals[0] : totals[1]);
  }
}
