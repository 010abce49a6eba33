// Query rows over ranges of keys, or over listed tiles of them; sequences in a batch, or packed one after another.
//
// Arguments: q, k, v, out by strides in elements (batch, head, row), last axis contiguous; `starts` and `blocks`: the tiles that a
// block of query rows reads, ascending, starts [B, Hq, query blocks + 1], or null for all; `q_ends` and `k_ends`: null, or where
// packed sequences begin, [sequences + 1], the strides of the batch being 0 then; `scale`: of the scores, times log2(e); a row at i
// sees keys from i + keys - rows - left to i + keys - rows + right, each end open where the number is negative (causal: right = 0).
// lse [B, Hq, rows], packed [Hq, rows], in natural logs; `state` and `state_lse` are laid out as `out` and `lse`.
#define RANGE_ARGUMENTS(T, K)                                                                                                     \
  const T *q, const K *k, const K *v, T *out, float *lse, const int *starts, const int *blocks, const int *q_ends, const int *k_ends, \
      i64 q_batch, i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 out_batch,  \
      i64 out_head, i64 out_row, int heads_per_kv, int rows, int keys, int left, int right, float scale, SCORE_ARGUMENTS
#define RANGE_PASSED                                                                                                              \
  q, k, v, out, lse, starts, blocks, q_ends, k_ends, Strides{q_batch, q_head, q_row}, Strides{k_batch, k_head, k_row},             \
      Strides{v_batch, v_head, v_row}, Strides{out_batch, out_head, out_row}, heads_per_kv, rows, keys, left, right, state, state_lse

// Tiles `from` .. `until` of a block of rows, and what each of them sees.
struct Ranges {
  static constexpr bool KEEPS_ROWS = false;  // what a row sees is found at once
  using Place = int;                         // a tile's number
  struct Row {
    int from, to;  // keys that it sees
  };
  const int* listed;
  int from, until, to;  // keys from `to` on no row of the block sees
  int first_row, rows, keys, left, right;
  int all_from, all_to;  // keys that all rows of the block see

  DEVICE int at(int i) const { return listed ? listed[i] : i; }
  DEVICE i64 query(int r) const { return first_row + r < rows ? first_row + r : -1; }
  DEVICE int number(int tile, int j) const { return tile * LISTED_KEYS + j; }
  DEVICE i64 key(int tile, int j) const { return number(tile, j) < keys ? number(tile, j) : -1; }
  // Whether any row of the block sees keys of a tile from `j` on.
  DEVICE bool reaches(int tile, int j) const { return number(tile, j) < to; }
  // Whether all rows of the block see a whole tile.
  DEVICE bool whole(int tile) const { return number(tile, 0) >= all_from && number(tile, LISTED_KEYS) <= all_to; }
  DEVICE int position(int r) const { return first_row + r + keys - rows; }
  DEVICE Row row(int r) const {
    int at = position(r);
    return {left < 0 ? 0 : at - left, query(r) < 0 ? 0 : right < 0 ? keys : min(keys, at + right + 1)};
  }
  DEVICE bool sees(const Row& row, int tile, int j) const { return number(tile, j) >= row.from && number(tile, j) < row.to; }
};

template <class T, class K>
struct RangesOf {
  Ranges pattern;
  Operands<T, NumberRows<K>> operands;
};

// What the block of this launch works on; `first_row` is below 0 where its sequence has no such block.
template <class T, class K, int ROWS>
DEVICE RangesOf<T, K> ranges_of(const T* q, const K* k, const K* v, T* out, float* lse, const int* starts, const int* blocks, const int* q_ends,
                             const int* k_ends, Strides q_by, Strides k_by, Strides v_by, Strides out_by, int heads_per_kv, int rows,
                             int keys, int left, int right, const float* state, const float* state_lse) {
  int sequence = blockIdx.z, head = blockIdx.y;
  i64 q_first = 0, k_first = 0, lse_first = (static_cast<i64>(sequence) * gridDim.y + head) * rows;
  if (q_ends) {
    q_first = q_ends[sequence];
    k_first = k_ends[sequence];
    lse_first = static_cast<i64>(head) * rows + q_first;
    rows = static_cast<int>(q_ends[sequence + 1] - q_first);
    keys = static_cast<int>(k_ends[sequence + 1] - k_first);
  }
  // Blocks of late rows have most keys where there is causality: they start first.
  int row_block = (rows + ROWS - 1) / ROWS - 1 - static_cast<int>(blockIdx.x), first = row_block < 0 ? -1 : row_block * ROWS;
  int offset = keys - rows;
  Ranges made{nullptr, 0, 0, keys, first, rows, keys, left, right, 0, keys};
  if (right >= 0) made.all_to = min(keys, first + offset + right + 1);
  if (left >= 0) made.all_from = min(first + ROWS, rows) - 1 + offset - left;
  if (right >= 0) made.to = max(min(keys, min(first + ROWS, rows) + offset + right), 0);
  if (left >= 0) made.from = max(first + offset - left, 0) / LISTED_KEYS;
  made.until = (made.to + LISTED_KEYS - 1) / LISTED_KEYS;
  if (starts) {
    const int* of_block = starts + (static_cast<i64>(sequence) * gridDim.y + head) * (gridDim.x + 1) + row_block;
    int begin = of_block[0], end = of_block[1];
    while (begin < end && blocks[begin] < made.from) begin++;
    while (begin < end && blocks[end - 1] >= made.until) end--;
    made.listed = blocks;
    made.from = begin;
    made.until = end;
  }
  i64 out_first = sequence * out_by.batch + head * out_by.head + q_first * out_by.row;
  Operands<T, NumberRows<K>> in{q + sequence * q_by.batch + head * q_by.head + q_first * q_by.row,
                                {k + sequence * k_by.batch + head / heads_per_kv * k_by.head + k_first * k_by.row, k_by.row},
                                {v + sequence * v_by.batch + head / heads_per_kv * v_by.head + k_first * v_by.row, v_by.row},
                                out + out_first, lse + lse_first, q_by.row, out_by.row,
                                state ? state + out_first : nullptr, state ? state_lse + lse_first : nullptr};
  return {made, in};
}
