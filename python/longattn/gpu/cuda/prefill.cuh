// Attention of many query rows on matrix units: 16 or 32 rows a warp, tiles of 64 keys, softmax on the way.
//
// Which rows a block has, which tiles it goes over and what a row sees of them is the pattern's (Ranges, or a grid's); how tiles come
// into shared memory is that of `Tiles`, which begins to fetch one kind, keys or values, while the other is used. A warp with 32 rows
// loads each fragment of keys and values for two products: with 16 the loads from shared memory take longer than the products.

constexpr int PREFILL_KEYS = LISTED_KEYS, PREFILL_THREADS = 128, PREFILL_WARPS = PREFILL_THREADS / WARP;

// ROWS rows into a tile; `at(i)`: where row i lies, in rows, or below 0 for zeros.
template <class T, int DIM, int ROWS, class At>
DEVICE void prefill_load(const Tile<T, DIM>& tile, const T* base, i64 stride, const At& at) {
  constexpr int PIECES = DIM / 8;
#pragma unroll 4
  for (int i = 0; i < ROWS * PIECES / PREFILL_THREADS; i++) {
    int place = threadIdx.x + i * PREFILL_THREADS, row = place / PIECES, piece = place % PIECES;
    i64 from = at(row);
    copy_async(tile.piece(row, piece), base + (from >= 0 ? from * stride + piece * 8 : 0), from >= 0);
  }
}

// Keys and values have a tile each, which their numbers are copied to.
template <class T, int DIM>
struct NumberTiles {
  const Operands<T>& in;
  Tile<T, DIM> keys, values;

  DEVICE NumberTiles(T* from, const Operands<T>& operands) : in(operands), keys{from}, values{from + PREFILL_KEYS * DIM} {}

  template <bool VALUES, class At>
  DEVICE void fetch(const At& at) const {
    const NumberRows<T>& rows = VALUES ? in.v : in.k;
    prefill_load<T, DIM, PREFILL_KEYS>(VALUES ? values : keys, rows.first, rows.stride, at);
    commit_async();
  }
  template <bool VALUES>
  DEVICE Tile<T, DIM> take() const {
    wait_async<0>();
    __syncthreads();  // these are there, the others are used up
    return VALUES ? values : keys;
  }
};

template <class T, int DIM, int ROWS, class Tiles, class Pattern, class Rows>
DEVICE void prefill(const Pattern& pattern, const Operands<T, Rows>& in, const ScoreOptions& options, float scale, int batch, int head) {
  constexpr int STEPS = DIM / 16, MINE = ROWS / PREFILL_WARPS / 16;  // products of 16 rows
  constexpr bool KEEP_QUERIES = MINE == 1 && DIM <= 128;              // in registers; more are loaded again for every tile
  using Place = typename Pattern::Place;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  auto row_at = [&](int m, int i) { return (warp * MINE + m) * 16 + group + 8 * i; };

  DYNAMIC_SHARED(shared);
  Tile<T, DIM> q_tile{reinterpret_cast<T*>(shared)};
  const Tiles tiles(q_tile.base + ROWS * DIM, in);
  prefill_load<T, DIM, ROWS>(q_tile, in.q, in.q_row, [&](int i) { return pattern.query(i); });
  if (pattern.from < pattern.until) {
    Place place = pattern.at(pattern.from);
    tiles.template fetch<false>([&](int i) { return pattern.key(place, i); });
  }
  commit_async();

  float o[MINE][DIM / 8][4], maxima[MINE][2], sums[MINE][2];
  typename Pattern::Row sight[MINE][2];  // where that is not found again for every tile
  ScoreRow of_row[MINE][2];
#pragma unroll
  for (int m = 0; m < MINE; m++) {
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int j = 0; j < 4; j++) o[m][d][j] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int r = row_at(m, i);
      maxima[m][i] = -infinity();
      sums[m][i] = 0.f;
      if (Pattern::KEEPS_ROWS) sight[m][i] = pattern.row(r);
      bool valid = pattern.query(r) >= 0;
      of_row[m][i] = score_row(options, scale, batch, head, valid ? static_cast<int>(pattern.query(r)) : 0, pattern.position(r));
    }
  }
  // Without options, scores stay products until they become weights.
  const float factor = SCORE_OPTIONS ? 1.f : scale;
  u32 q_parts[KEEP_QUERIES ? STEPS : 1][MINE][4];
  auto load_queries = [&](u32(&to)[MINE][4], int s) {
#pragma unroll
    for (int m = 0; m < MINE; m++) load_matrices(to[m], q_tile.piece((warp * MINE + m) * 16 + (lane & 15), 2 * s + (lane >> 4)));
  };

  for (int c = pattern.from; c < pattern.until; c++) {
    Place place = pattern.at(c);
    const Tile<T, DIM> k_tile = tiles.template take<false>();
    tiles.template fetch<true>([&](int i) { return pattern.key(place, i); });
    if (KEEP_QUERIES && c == pattern.from) {
#pragma unroll
      for (int s = 0; s < STEPS; s++) load_queries(q_parts[s % (KEEP_QUERIES ? STEPS : 1)], s);
    }
    float scores[MINE][PREFILL_KEYS / 8][4];
#pragma unroll
    for (int m = 0; m < MINE; m++)
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) scores[m][n][j] = 0.f;
#pragma unroll(KEEP_QUERIES ? STEPS : 2)
    for (int s = 0; s < STEPS; s++) {
      u32(&q_part)[MINE][4] = q_parts[KEEP_QUERIES ? s : 0];
      if (!KEEP_QUERIES) load_queries(q_part, s);
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 16; n++) {
        u32 part[4];
        load_matrices(part, k_tile.piece(n * 16 + (lane & 7) + ((lane >> 4) << 3), 2 * s + ((lane >> 3) & 1)));
#pragma unroll
        for (int m = 0; m < MINE; m++) {
          multiply(scores[m][2 * n], q_part[m], part[0], part[1], T{});
          multiply(scores[m][2 * n + 1], q_part[m], part[2], part[3], T{});
        }
      }
    }
    bool whole = !SCORE_OPTIONS && pattern.whole(place);  // most tiles are: nothing is looked at key by key
    float shrink[MINE][2];
    bool same = true;
#pragma unroll
    for (int m = 0; m < MINE; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float row[PREFILL_KEYS / 4];
#pragma unroll
        for (int n = 0; n < PREFILL_KEYS / 4; n++) row[n] = scores[m][n / 2][2 * i + n % 2];
        if (!whole) {
          typename Pattern::Row sees = Pattern::KEEPS_ROWS ? sight[m][i] : pattern.row(row_at(m, i));
#pragma unroll
          for (int n = 0; n < PREFILL_KEYS / 4; n++) {
            int key = n / 2 * 8 + in_group * 2 + n % 2;
            if (!pattern.sees(sees, place, key)) {
              row[n] = -infinity();
            } else if (SCORE_OPTIONS) {
              row[n] = score_of(options, of_row[m][i], row[n], pattern.number(place, key));
            }
          }
        }
        shrink[m][i] = softmax_step<4>(row, maxima[m][i], sums[m][i], factor);
        same = same && shrink[m][i] == 1.f;
#pragma unroll
        for (int n = 0; n < PREFILL_KEYS / 4; n++) scores[m][n / 2][2 * i + n % 2] = row[n];
      }
    // After some tiles no row of a warp has a new largest score any more.
    if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
      for (int m = 0; m < MINE; m++)
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
          for (int j = 0; j < 4; j++) o[m][d][j] *= shrink[m][j >> 1];
    }
    const Tile<T, DIM> v_tile = tiles.template take<true>();
    if (c + 1 < pattern.until) {
      Place next = pattern.at(c + 1);
      tiles.template fetch<false>([&](int i) { return pattern.key(next, i); });
    }
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 16; n++) {
      u32 weights[MINE][4];
#pragma unroll
      for (int m = 0; m < MINE; m++)
#pragma unroll
        for (int j = 0; j < 4; j++) weights[m][j] = pair_of<T>(scores[m][2 * n + j / 2][j % 2 * 2], scores[m][2 * n + j / 2][j % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < DIM / 16; d++) {
        u32 part[4];
        load_matrices_transposed(part, v_tile.piece(n * 16 + (lane & 15), 2 * d + (lane >> 4)));
#pragma unroll
        for (int m = 0; m < MINE; m++) {
          multiply(o[m][2 * d], weights[m], part[0], part[1], T{});
          multiply(o[m][2 * d + 1], weights[m], part[2], part[3], T{});
        }
      }
    }
  }
  wait_async<0>();

  float sink = sink_of(options, head);
  u32 again = 0;  // rows of the warp whose sums are no numbers
#pragma unroll
  for (int m = 0; m < MINE; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      i64 row = pattern.query(row_at(m, i));
      bool numbers = true;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) numbers = numbers && finite(o[m][d][2 * i]) && finite(o[m][d][2 * i + 1]);
      u32 lanes = __ballot_sync(ALL_LANES, row >= 0 && !numbers);
      maxima[m][i] *= factor;
      sums[m][i] = lanes_sum<4>(sums[m][i]);
#pragma unroll
      for (int g = 0; g < 8; g++) again |= (lanes >> 4 * g & 15 ? 1u : 0u) << (16 * m + g + 8 * i);
      SoftmaxEnd end = softmax_end(maxima[m][i], sums[m][i], sink, row < 0 ? -infinity() : earlier_of(in.state_lse, row));
      if (row < 0) continue;
      if (in_group == 0) in.lse[row] = end.lse;
      i64 at = row * in.out_row;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        int channel = d * 8 + in_group * 2;
        *reinterpret_cast<u32*>(in.out + at + channel) = pair_of<T>(output_of(end, o[m][d][2 * i], in.state, at + channel),
                                                                    output_of(end, o[m][d][2 * i + 1], in.state, at + channel + 1));
      }
    }
  if (again == 0) return;
  __syncwarp();
  for (int r = 0; r < 16 * MINE; r++) {
    if (!(again >> r & 1)) continue;
    float most = 0.f, total = 0.f;
#pragma unroll
    for (int m = 0; m < MINE; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float top = __shfl_sync(ALL_LANES, maxima[m][i], r % 8 * 4), sum = __shfl_sync(ALL_LANES, sums[m][i], r % 8 * 4);
        if (r / 8 == 2 * m + i) {
          most = top;
          total = sum;
        }
      }
    prefill_again<DIM>(pattern, in, options, scale, batch, head, warp * 16 * MINE + r, most, total);
  }
}
