// What kernels of softmax attention share: options of the scores, and the softmax of a row as its scores come in.
//
// Scores are in units of log 2. Only texts compiled with SCORE_OPTIONS look at the options; in the others they cost nothing. With 2 they
// do not look at those that depend on the key, its bias and its distance.
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
};
#define SCORE_ARGUMENTS                                                                                                     \
  float softcap, const float *scales, i64 scales_batch, i64 scales_head, i64 scales_row, const float *slopes, i64 slopes_batch, \
      const float *bias, i64 bias_batch, i64 bias_head, i64 bias_row, i64 bias_key, const float *sinks
#define SCORE_PASSED                                                                                                        \
  ScoreOptions {                                                                                                            \
    softcap, scales, scales_batch, scales_head, scales_row, slopes, slopes_batch, bias, bias_batch, bias_head, bias_row, bias_key, sinks \
  }

// The options of one query row.
struct ScoreRow {
  float scale, slope;
  const float* bias;
  int position;  // among the keys
};

DEVICE ScoreRow score_row(const ScoreOptions& options, float scale, int batch, int head, int row, int position) {
  ScoreRow made{scale, 0.f, nullptr, position};
  if (SCORE_OPTIONS) {
    if (options.scales) made.scale = options.scales[batch * options.scales_batch + head * options.scales_head + row * options.scales_row] * LOG2_E;
    if (options.slopes) made.slope = options.slopes[batch * options.slopes_batch + head] * LOG2_E;
    if (options.bias) made.bias = options.bias + batch * options.bias_batch + head * options.bias_head + row * options.bias_row;
  }
  return made;
}

DEVICE float score_of(const ScoreOptions& options, const ScoreRow& row, float product, int key) {
  float x = product * row.scale;
  if (SCORE_OPTIONS) {
    if (options.softcap > 0.f) x = options.softcap * tanhf(x / options.softcap);
  }
  if (SCORE_OPTIONS == 1) {
    if (row.bias) x += row.bias[key * options.bias_key] * LOG2_E;
    x -= row.slope * static_cast<float>(max(row.position - key, key - row.position));
  }
  return x;
}

// One more logit of a head, which takes its share of the softmax.
DEVICE float sink_of(const ScoreOptions& options, int head) {
  return SCORE_OPTIONS && options.sinks ? options.sinks[head] * LOG2_E : -infinity();
}

// Takes in COUNT scores a lane of a row that LANES lanes share: they become weights. What was summed with the weights before must
// be multiplied by the result.
template <int LANES, int COUNT>
DEVICE float softmax_step(float (&scores)[COUNT], float& most, float& sum) {
  float now = most;
#pragma unroll
  for (int i = 0; i < COUNT; i++) now = fmaxf(now, scores[i]);
  now = lanes_max<LANES>(now);
  // Where nothing has been visible yet, weights are 0, not NaN.
  float base = now > -infinity() ? now : 0.f, shrink = exp2f(most - base);
  most = now;
  sum *= shrink;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    scores[i] = exp2f(scores[i] - base);
    sum += scores[i];
  }
  return shrink;
}

// Factor that turns sums of weighted values into the output, and the log-sum-exp in natural logarithms.
struct SoftmaxEnd {
  float factor, lse;
};
DEVICE SoftmaxEnd softmax_end(float most, float sum, float sink) {
  float top = fmaxf(most, sink);
  if (!(top > -infinity())) return {0.f, -infinity()};
  float grown = exp2f(most - top), whole = sum * grown + exp2f(sink - top);
  return {whole > 0.f ? grown / whole : 0.f, (top + log2f(whole)) * LN_2};
}

// ---- what a block of query rows reads and writes ----
constexpr int LISTED_KEYS = 64;  // of a tile

// One head of one sequence: rows by strides in elements, log-sum-exps one after another.
template <class T>
struct Operands {
  const T *q, *k, *v;
  T* out;
  float* lse;
  i64 q_row, k_row, v_row, out_row;
};
