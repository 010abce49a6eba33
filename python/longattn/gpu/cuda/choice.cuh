// The k rows with the largest scores, by counting: scores are unsigned integers, of which the k-th largest is found from histograms.
// Ties go to the lower rows, and rows come in ascending order.

constexpr int CHOICE_THREADS = 256;
constexpr int CHOICE_ROWS = 2048;  // of a block

// A step: of `counts` [heads, bins] of scores' next bits, the bin with the k-th largest. threshold [heads, 2]: the bits so far, and how many
// rows with just these bits are wanted. With k below 0 what the step before left says how many. Grid: heads of all batches.
DEVICE void choice_threshold(const int* counts, u32* threshold, int bins, int k) {
  DYNAMIC_SHARED(shared);
  int* sums = reinterpret_cast<int*>(shared);  // rows in the bins of each thread
  i64 head = blockIdx.x;
  int each = (bins + CHOICE_THREADS - 1) / CHOICE_THREADS, first = threadIdx.x * each, end = min(first + each, bins), sum = 0;
  u32 before = k < 0 ? threshold[2 * head] * bins : 0;
  if (k < 0) k = static_cast<int>(threshold[2 * head + 1]);
  for (int i = first; i < end; i++) sum += counts[head * bins + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int above = 0;
  for (int t = threadIdx.x + 1; t < CHOICE_THREADS; t++) above += sums[t];
  // One thread finds the k-th largest among its bins.
  if (above >= k || above + sum < k) return;
  for (int i = end - 1; i >= first; i--) {
    int here = counts[head * bins + i];
    if (above + here >= k) {
      threshold[2 * head] = before + i;
      threshold[2 * head + 1] = k - above;
      return;
    }
    above += here;
  }
}

// How many rows have each value of the bits from `shift` on, of those whose bits above are the threshold's. counts [heads, bins], zeroed.
// Grid: rows / CHOICE_ROWS, heads, batch.
DEVICE void choice_histogram(const u32* scores, const u32* threshold, int* counts, int rows, int shift, int bins) {
  DYNAMIC_SHARED(shared);
  int* histogram = reinterpret_cast<int*>(shared);
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < bins; i += CHOICE_THREADS) histogram[i] = 0;
  __syncthreads();
  u32 above = threshold[2 * head];
  int first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows);
  for (int row = first + threadIdx.x; row < end; row += CHOICE_THREADS) {
    u32 bits = scores[head * rows + row] >> shift;
    if (bits / bins == above) atomicAdd(histogram + bits % bins, 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += CHOICE_THREADS)
    if (histogram[i]) atomicAdd(counts + head * bins + i, histogram[i]);
}

// How many rows of each block of rows are above the threshold, and how many at it: found [heads, blocks, 2].
// Grid: rows / CHOICE_ROWS, heads, batch.
template <class Score>
DEVICE void choice_count(const Score* scores, const u32* threshold, int* found, int rows) {
  DYNAMIC_SHARED(shared);
  int* sums = reinterpret_cast<int*>(shared);
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  u32 at = threshold[2 * head];
  int above = 0, equal = 0, first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows);
  for (int row = first + threadIdx.x; row < end; row += CHOICE_THREADS) {
    u32 score = scores[head * rows + row];
    above += score > at;
    equal += score == at;
  }
  atomicAdd(sums, above);
  atomicAdd(sums + 1, equal);
  __syncthreads();
  if (threadIdx.x < 2) found[(head * gridDim.x + blockIdx.x) * 2 + threadIdx.x] = sums[threadIdx.x];
}

// The chosen rows [heads, k], ascending; of rows at the threshold the first. Grid as of choice_count.
template <class Score>
DEVICE void choice_collect(const Score* scores, const u32* threshold, const int* found, int* chosen, int rows, int k) {
  DYNAMIC_SHARED(shared);
  int* per_warp = reinterpret_cast<int*>(shared);  // [warps, 2]
  constexpr int WARPS = CHOICE_THREADS / WARP;
  i64 head = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 at = threshold[2 * head];
  int wanted = static_cast<int>(threshold[2 * head + 1]), above = 0, equal = 0;
  for (int b = 0; b < static_cast<int>(blockIdx.x); b++) {
    above += found[(head * gridDim.x + b) * 2];
    equal += found[(head * gridDim.x + b) * 2 + 1];
  }
  int first = blockIdx.x * CHOICE_ROWS, end = min(first + CHOICE_ROWS, rows);
  u32 before = (1u << lane) - 1;
  for (int base = first; base < end; base += CHOICE_THREADS) {
    int row = base + threadIdx.x;
    bool valid = row < end;
    u32 score = valid ? static_cast<u32>(scores[head * rows + row]) : 0;
    u32 is_above = __ballot_sync(ALL_LANES, valid && score > at), is_equal = __ballot_sync(ALL_LANES, valid && score == at);
    if (lane == 0) {
      per_warp[2 * warp] = __popc(is_above);
      per_warp[2 * warp + 1] = __popc(is_equal);
    }
    __syncthreads();
    int warp_above = above, warp_equal = equal;
    for (int w = 0; w < WARPS; w++) {
      above += per_warp[2 * w];
      equal += per_warp[2 * w + 1];
      if (w < warp) {
        warp_above += per_warp[2 * w];
        warp_equal += per_warp[2 * w + 1];
      }
    }
    int my_above = warp_above + __popc(is_above & before), my_equal = warp_equal + __popc(is_equal & before);
    if (valid && (score > at || (score == at && my_equal < wanted))) chosen[head * k + my_above + min(my_equal, wanted)] = row;
    __syncthreads();
  }
}

#define CHOICE(Score, NAME)                                                                                                \
  extern "C" __global__ void __launch_bounds__(CHOICE_THREADS)                                                             \
      choice_threshold_##NAME(const int* counts, u32* threshold, int bins, int k) {                                        \
    choice_threshold(counts, threshold, bins, k);                                                                          \
  }                                                                                                                        \
  KERNEL(choice_threshold_##NAME)                                                                                          \
  extern "C" __global__ void __launch_bounds__(CHOICE_THREADS)                                                             \
      choice_count_##NAME(const Score* scores, const u32* threshold, int* found, int rows) {                               \
    choice_count<Score>(scores, threshold, found, rows);                                                                   \
  }                                                                                                                        \
  KERNEL(choice_count_##NAME)                                                                                              \
  extern "C" __global__ void __launch_bounds__(CHOICE_THREADS)                                                             \
      choice_rows_##NAME(const Score* scores, const u32* threshold, const int* found, int* chosen, int rows, int k) { \
    choice_collect<Score>(scores, threshold, found, chosen, rows, k);                                                      \
  }                                                                                                                        \
  KERNEL(choice_rows_##NAME)
