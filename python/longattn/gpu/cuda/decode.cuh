// What kernels of a few query rows over long keys share: arguments, ranges, and the end of a split.
//
// The query heads of a KV head and their positions are the rows, up to 16 in a block. The keys are cut into splits; merge.cu puts the
// splits together.
//
// Arguments: q [B, Hkv, rows, D] contiguous, where row r is position r % positions of the KV head's query head r / positions; keys
// and values by strides in elements, last axis contiguous; `listed`: rows of the keys to read, [B, Hkv, most], or null; `lengths`:
// keys (or listed rows) of each sequence and KV head by strides, or null for `most`; `scale`: of the scores, times log2(e). A row at position i sees keys
// from length - positions + i - left to length - positions + i + right, each end open where the number is negative; only texts
// with SCORE_OPTIONS look at `left`. Out: `partial` [B, Hkv, rows, splits, D] and its log-sum-exp in natural logs.
// Grid: splits, KV heads times blocks of rows, batch.
#define DECODE_ARGUMENTS(Q, K)                                                                                                   \
  const Q *q, const K *k, const K *v, const int *listed, const int *lengths, float *partial, float *lse, i64 k_batch, i64 k_head, \
      i64 k_row, i64 v_batch, i64 v_head, i64 v_row, int lengths_batch, int lengths_head, int most, int split_keys, int all_rows, \
      int positions, int left, int right, float scale, SCORE_ARGUMENTS
#define DECODE_PASSED                                                                                                            \
  q, k, v, listed, Lengths{lengths, lengths_batch, lengths_head}, partial, lse, Strides{k_batch, k_head, k_row},                  \
      Strides{v_batch, v_head, v_row}, most, split_keys, all_rows, positions, left, right, scale, SCORE_PASSED

struct Lengths {
  const int* first;
  int batch, head;
};

constexpr int DECODE_WARPS = 4;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;

// The part of one block: keys of a split, and up to ROWS rows of a KV head.
template <int ROWS, int DIM>
struct DecodePart {
  int head, heads, row_from, rows, from, to, length, positions, left, right, group;
  i64 batch_head, first_row;  // of all KV heads, of all rows

  DEVICE DecodePart(const Lengths& lengths, int most, int split_keys, int all_rows, int positions_, int left_, int right_) {
    int row_blocks = (all_rows + ROWS - 1) / ROWS;
    head = blockIdx.y / row_blocks;
    heads = gridDim.y / row_blocks;
    row_from = blockIdx.y % row_blocks * ROWS;
    rows = min(ROWS, all_rows - row_from);
    length = lengths.first ? min(lengths.first[blockIdx.z * lengths.batch + head * lengths.head], most) : most;
    from = static_cast<int>(blockIdx.x) * split_keys;
    to = min(from + split_keys, length);
    positions = positions_;
    left = left_;
    right = right_;
    group = all_rows / positions;
    batch_head = static_cast<i64>(blockIdx.z) * heads + head;
    first_row = batch_head * all_rows + row_from;
  }
  DEVICE int query_head(int row) const { return head * group + (row_from + row) / positions; }
  DEVICE int position(int row) const { return length - positions + (row_from + row) % positions; }
  // Keys that a row sees.
  DEVICE int sees_from(int row) const { return SCORE_OPTIONS && left >= 0 ? position(row) - left : 0; }
  DEVICE int sees_to(int row) const { return row >= rows ? 0 : right < 0 ? to : min(to, position(row) + right + 1); }
  DEVICE ScoreRow scores(const ScoreOptions& options, float scale, int row) const {
    row = min(row, rows - 1);
    return score_row(options, scale, blockIdx.z, query_head(row), (row_from + row) % positions, position(row));
  }

  // Puts together what `parts` groups of lanes have of each row: largest score and sum [rows, parts], sum of values [rows, parts, D].
  // The sink belongs to the first split, and so does what an earlier part left.
  DEVICE void merge(const float* maxima, const float* sums, const float* outputs, int parts, const ScoreOptions& options, float* partial,
                    float* lse) const {
    __syncthreads();
    for (int e = threadIdx.x; e < rows * DIM; e += DECODE_THREADS) {
      int row = e / DIM, d = e % DIM;
      float most = -infinity(), sum = 0.f, o = 0.f;
      for (int p = 0; p < parts; p++) most = fmaxf(most, maxima[row * parts + p]);
      float base = most > -infinity() ? most : 0.f;
      for (int p = 0; p < parts; p++) {
        if (sums[row * parts + p] == 0.f) continue;  // saw nothing
        float weight = exp2f(maxima[row * parts + p] - base);
        sum += weight * sums[row * parts + p];
        o += weight * outputs[(row * parts + p) * DIM + d];
      }
      bool first = blockIdx.x == 0;
      SoftmaxEnd end = softmax_end(most, sum, first ? sink_of(options, query_head(row)) : -infinity(),
                                   first ? earlier_of(options.state_lse, first_row + row) : -infinity());
      i64 at = (first_row + row) * gridDim.x + blockIdx.x;
      partial[at * DIM + d] = output_of(end, o, options.state, (first_row + row) * DIM + d);
      if (d == 0) lse[at] = end.lse;
    }
  }
};
