// What kernels of softmax attention share: options of the scores, and the softmax of a row as its scores come in.
//
// Scores are in units of log 2. Only texts compiled with SCORE_OPTIONS look at the options; in the others they cost nothing. With 2 they
// do not look at those that depend on the key, nor at what an earlier part left.
#ifndef SCORE_OPTIONS
#define SCORE_OPTIONS 0
#endif

// What the scores of a launch get beside one factor. Null or 0: nothing.
struct ScoreOptions {
  float softcap;        // times log2(e)
  const float* scales;  // [B, Hq, rows], in the place of the factor
  i64 scales_batch, scales_head, scales_row;
  const float* slopes;  // [B, Hq]
  i64 slopes_batch;
  const float* bias;  // [B, Hq, rows, keys]
  i64 bias_batch, bias_head, bias_row, bias_key;
  const float* sinks;  // [Hq]
  const u8* mask;      // [B, Hq, rows, keys]; 0 hides
  i64 mask_batch, mask_head, mask_row, mask_key;
  const float* relative;  // [Hq, entries], by key less position, the entry of distance 0 being relative_zero
  int relative_entries, relative_zero;
  const int *row_segments, *key_segments;  // [B, rows] and [B, keys]: a row sees keys of its own number
  i64 row_segments_batch, key_segments_batch;
  const int* until;  // [B, keys]: positions, of which key 0 has `first_key`, that see a key lie below
  i64 until_batch;
  int first_key;
  const float *state, *state_lse;  // output of an earlier part and its log-sum-exp, laid out as those of the launch
};
#define SCORE_ARGUMENTS                                                                                                     \
  float softcap, const float *scales, i64 scales_batch, i64 scales_head, i64 scales_row, const float *slopes, i64 slopes_batch, \
      const float *bias, i64 bias_batch, i64 bias_head, i64 bias_row, i64 bias_key, const float *sinks, const u8 *mask,     \
      i64 mask_batch, i64 mask_head, i64 mask_row, i64 mask_key, const float *relative, int relative_entries, int relative_zero, \
      const int *row_segments, const int *key_segments, i64 row_segments_batch, i64 key_segments_batch, const int *until,   \
      i64 until_batch, int first_key, const float *state, const float *state_lse
#define SCORE_PASSED                                                                                                        \
  ScoreOptions {                                                                                                            \
    softcap, scales, scales_batch, scales_head, scales_row, slopes, slopes_batch, bias, bias_batch, bias_head, bias_row, bias_key, sinks, \
        mask, mask_batch, mask_head, mask_row, mask_key, relative, relative_entries, relative_zero, row_segments, key_segments, \
        row_segments_batch, key_segments_batch, until, until_batch, first_key, state, state_lse                             \
  }

// One query row. Where its bias, mask and table lie is computed for each key anew: pointers of every row would not fit into registers.
struct ScoreRow {
  float scale, slope;
  int batch, head, row, position;  // the latter among the keys
  int segment;
};

DEVICE ScoreRow score_row(const ScoreOptions& options, float scale, int batch, int head, int row, int position) {
  ScoreRow made{scale, 0.f, batch, head, row, position, 0};
  if (SCORE_OPTIONS) {
    if (options.scales) made.scale = options.scales[batch * options.scales_batch + head * options.scales_head + row * options.scales_row] * LOG2_E;
  }
  if (SCORE_OPTIONS == 1) {
    if (options.slopes) made.slope = options.slopes[batch * options.slopes_batch + head] * LOG2_E;
    if (options.row_segments) made.segment = options.row_segments[batch * options.row_segments_batch + row];
  }
  return made;
}

// Of a key that causality and window let the row see; minus infinity where an option hides it.
DEVICE float score_of(const ScoreOptions& options, const ScoreRow& row, float product, int key) {
  float x = product * row.scale;
  if (SCORE_OPTIONS) {
    if (options.softcap > 0.f) x = options.softcap * tanhf(x / options.softcap);
  }
  if (SCORE_OPTIONS == 1) {
    x -= row.slope * static_cast<float>(max(row.position - key, key - row.position));
    if (options.bias)
      x += options.bias[row.batch * options.bias_batch + row.head * options.bias_head + row.row * options.bias_row + key * options.bias_key] * LOG2_E;
    if (options.relative) {
      int entry = min(max(key - row.position + options.relative_zero, 0), options.relative_entries - 1);
      x += options.relative[static_cast<i64>(row.head) * options.relative_entries + entry] * LOG2_E;
    }
    if (options.mask &&
        !options.mask[row.batch * options.mask_batch + row.head * options.mask_head + row.row * options.mask_row + key * options.mask_key])
      x = -infinity();
    if (options.key_segments && options.key_segments[row.batch * options.key_segments_batch + key] != row.segment) x = -infinity();
    if (options.until && row.position + options.first_key >= options.until[row.batch * options.until_batch + key]) x = -infinity();
  }
  return x;
}

// One more logit of a head, which takes its share of the softmax.
DEVICE float sink_of(const ScoreOptions& options, int head) {
  return SCORE_OPTIONS && options.sinks ? options.sinks[head] * LOG2_E : -infinity();
}

// Takes in COUNT scores a lane of a row that LANES lanes share: they become weights. What was summed with the weights before must
// be multiplied by the result. Scores, and `most` too, count times `factor`, which is above 0: then the largest one need not be
// multiplied first, and a weight takes one multiply-add.
template <int LANES, int COUNT>
DEVICE float softmax_step(float (&scores)[COUNT], float& most, float& sum, float factor = 1.f) {
  float now = most;
#pragma unroll
  for (int i = 0; i < COUNT; i++) now = fmaxf(now, scores[i]);
  now = lanes_max<LANES>(now);
  // Where nothing has been visible yet, weights are 0, not NaN.
  float base = now > -infinity() ? now * factor : 0.f, shrink = exp2f(most * factor - base);
  most = now;
  sum *= shrink;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    scores[i] = exp2f(scores[i] * factor - base);
    sum += scores[i];
  }
  return shrink;
}

// What an earlier part over other keys left of a row: its log-sum-exp in units of log 2, minus infinity where there is nothing.
DEVICE float earlier_of(const float* state_lse, i64 at) { return SCORE_OPTIONS == 1 && state_lse ? state_lse[at] * LOG2_E : -infinity(); }

// Factors that turn sums of weighted values, and an earlier part's output, into the output; the log-sum-exp in natural logarithms.
struct SoftmaxEnd {
  float factor, earlier, lse;
};
DEVICE SoftmaxEnd softmax_end(float most, float sum, float sink, float earlier = -infinity()) {
  float top = fmaxf(fmaxf(most, sink), earlier);
  if (!(top > -infinity())) return {0.f, 0.f, sum == sum ? -infinity() : sum};  // nothing but NaN
  float grown = exp2f(most - top), whole = sum * grown + exp2f(sink - top), kept = SCORE_OPTIONS == 1 ? exp2f(earlier - top) : 0.f;
  if (SCORE_OPTIONS == 1) whole += kept;
  return {whole > 0.f ? grown / whole : 0.f, whole > 0.f ? kept / whole : 0.f, (top + log2f(whole)) * LN_2};
}
// An output; an earlier part that has no share in it may hold anything.
DEVICE float output_of(const SoftmaxEnd& end, float sum, const float* state, i64 at) {
  float made = sum * end.factor;
  if (SCORE_OPTIONS == 1 && end.earlier > 0.f) made += end.earlier * state[at];
  return made;
}

// ---- rows that hold no number ----
// A weight of 0 times a NaN or an infinity is a NaN, so products of whole tiles spread what stands in values that a row does not see.
// Such rows are computed again by a warp, over visible keys alone; others pay a look at their sums.
DEVICE bool finite(float x) { return fabsf(x) < infinity(); }

// Numbers `lane + 32 i` of a row.
template <int DIM, class T>
DEVICE void load_row(float (&to)[DIM / WARP], const T* row) {
#pragma unroll
  for (int i = 0; i < DIM / WARP; i++) to[i] = to_float(row[threadIdx.x % WARP + WARP * i]);
}

// A row of 8-bit codes: offset + scale * code.
struct CodedRow {
  const u8* codes;
  float scale, offset;
};
template <int DIM>
DEVICE void load_row(float (&to)[DIM / WARP], const CodedRow& row) {
#pragma unroll
  for (int i = 0; i < DIM / WARP; i++) to[i] = row.offset + row.scale * row.codes[threadIdx.x % WARP + WARP * i];
}

// Adds the value of one key to a row's sum, by all lanes of a warp; `score(product)` is minus infinity where it is hidden, `most` the
// row's largest.
template <int DIM, class Row, class Score>
DEVICE void add_key(float (&sum)[DIM / WARP], const float (&query)[DIM / WARP], const Row& key, const Row& value, float most, const Score& score) {
  float numbers[DIM / WARP], product = 0.f;
  load_row<DIM>(numbers, key);
#pragma unroll
  for (int i = 0; i < DIM / WARP; i++) product += query[i] * numbers[i];
  float x = score(lanes_sum<WARP>(product));
  if (x == -infinity()) return;
  float weight = exp2f(x - most);
  load_row<DIM>(numbers, value);
#pragma unroll
  for (int i = 0; i < DIM / WARP; i++) sum[i] += weight * numbers[i];
}

// ---- what a block of query rows reads and writes ----
constexpr int LISTED_KEYS = 64;  // of a tile

// Keys or values of one head of one sequence by a stride in elements: numbers, or codes.
template <class T>
struct NumberRows {
  const T* first;
  i64 stride;
  DEVICE const T* at(i64 row) const { return first + row * stride; }
};
struct CodeRows {
  const u8* first;
  i64 stride;
  const float* parameters;  // scale and offset of each row
  DEVICE CodedRow at(i64 row) const { return {first + row * stride, parameters[2 * row], parameters[2 * row + 1]}; }
};

// One head of one sequence: rows by strides in elements, log-sum-exps one after another.
template <class T, class Rows = NumberRows<T>>
struct Operands {
  const T* q;
  Rows k, v;
  T* out;
  float* lse;
  i64 q_row, out_row;
  const float *state, *state_lse;  // as `out` and `lse`, or null
};

// The output of a row of a pattern, over visible keys alone: see `add_key`. By all lanes of a warp.
template <int DIM, class T, class Rows, class Pattern>
DEVICE void prefill_again(const Pattern& pattern, const Operands<T, Rows>& in, const ScoreOptions& options, float scale, int batch, int head, int r,
                          float most, float total) {
  i64 row = pattern.query(r);
  typename Pattern::Row sight = pattern.row(r);
  ScoreRow of_row = score_row(options, scale, batch, head, static_cast<int>(row), pattern.position(r));
  float query[DIM / WARP], sum[DIM / WARP] = {};
  load_row<DIM>(query, in.q + row * in.q_row);
  for (int c = pattern.from; c < pattern.until; c++) {
    typename Pattern::Place place = pattern.at(c);
    for (int j = 0; j < LISTED_KEYS; j++) {
      i64 key = pattern.key(place, j);
      if (key < 0 || !pattern.sees(sight, place, j)) continue;
      add_key<DIM>(sum, query, in.k.at(key), in.v.at(key), most,
                   [&](float product) { return score_of(options, of_row, product, pattern.number(place, j)); });
    }
  }
  SoftmaxEnd end = softmax_end(most, total, sink_of(options, head), earlier_of(in.state_lse, row));
#pragma unroll
  for (int i = 0; i < DIM / WARP; i++) {
    i64 at = row * in.out_row + threadIdx.x % WARP + WARP * i;
    from_float(output_of(end, sum[i], in.state, at), in.out[at]);
  }
}
