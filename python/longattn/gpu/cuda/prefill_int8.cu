// Attention of many query rows over ranges of keys and values that are 8-bit codes. Arguments: those of ranges.cuh without packed
// sequences, then scale and offset of each key and value, [B, Hkv, keys, 2], by strides of batch and head. Grid: as of prefill.cu.

// Codes of a tile wait in a place of their own, with their scales and offsets, and become numbers of the dtype when their turn comes.
// Keys and values have one tile and one such place: the one is used while the other's codes arrive.
template <class T, int DIM>
struct CodedTiles {
  static constexpr int PIECES = DIM / 16, CODES = PREFILL_KEYS * DIM;
  const Operands<T, CodeRows>& in;
  Tile<T, DIM> tile;
  u8* codes;

  DEVICE CodedTiles(T* from, const Operands<T, CodeRows>& operands)
      : in(operands), tile{from}, codes(reinterpret_cast<u8*>(from + PREFILL_KEYS * DIM)) {}

  template <bool VALUES, class At>
  DEVICE void fetch(const At& at) const {
    const CodeRows& rows = VALUES ? in.v : in.k;
#pragma unroll 4
    for (int place = threadIdx.x; place < PREFILL_KEYS * PIECES; place += PREFILL_THREADS) {
      i64 from = at(place / PIECES);
      copy_async(codes + 16 * place, rows.first + (from >= 0 ? from * rows.stride + place % PIECES * 16 : 0), from >= 0);
    }
    if (threadIdx.x < PREFILL_KEYS) {
      i64 from = at(threadIdx.x);
      copy8_async(codes + CODES + 8 * threadIdx.x, rows.parameters + (from >= 0 ? 2 * from : 0), from >= 0);
    }
    commit_async();
  }
  template <bool VALUES>
  DEVICE Tile<T, DIM> take() const {
    wait_async<0>();
    __syncthreads();  // the codes are there, the tile is used up
    const float* parameters = reinterpret_cast<const float*>(codes + CODES);
#pragma unroll 2
    for (int place = threadIdx.x; place < PREFILL_KEYS * PIECES; place += PREFILL_THREADS) {
      int row = place / PIECES, piece = place % PIECES;
      Vector16<u8> found = load16(codes + 16 * place);
      float scale = parameters[2 * row], offset = parameters[2 * row + 1];
      // Eight lanes that write at a time have eight pieces of a row of tiles: half of them begin with their second one.
      int second = DIM > 64 ? piece >> 2 & 1 : 0;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int half = n ^ second;
        Vector16<u32> numbers;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 low = half ? found.at[8 + 2 * i] : found.at[2 * i], high = half ? found.at[9 + 2 * i] : found.at[2 * i + 1];
          numbers.at[i] = pair_of<T>(offset + scale * static_cast<float>(low), offset + scale * static_cast<float>(high));
        }
        *reinterpret_cast<Vector16<u32>*>(tile.piece(row, 2 * piece + half)) = numbers;
      }
    }
    __syncthreads();  // the tile is there, the place of codes is free
    return tile;
  }
};

#define PREFILL_CODES(T, D, ROWS)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)                                                                         \
      prefill_int8_##T##_##D##_##ROWS(RANGE_ARGUMENTS(T, u8), const float* k_parameters, i64 k_parameters_batch, i64 k_parameters_head,  \
                                      const float* v_parameters, i64 v_parameters_batch, i64 v_parameters_head) {                        \
    RangesOf<T, u8> made = ranges_of<T, u8, ROWS>(RANGE_PASSED);                                                                          \
    if (made.pattern.first_row < 0) return;                                                                                               \
    i64 kv_head = blockIdx.y / heads_per_kv;                                                                                              \
    const Operands<T, NumberRows<u8>>& of = made.operands;                                                                                \
    Operands<T, CodeRows> in{of.q,                                                                                                        \
                             {of.k.first, of.k.stride, k_parameters + blockIdx.z * k_parameters_batch + kv_head * k_parameters_head},     \
                             {of.v.first, of.v.stride, v_parameters + blockIdx.z * v_parameters_batch + kv_head * v_parameters_head},     \
                             of.out, of.lse, of.q_row, of.out_row, of.state, of.state_lse};                                               \
    prefill<T, D, ROWS, CodedTiles<T, D>>(made.pattern, in, SCORE_PASSED, scale, blockIdx.z, blockIdx.y);                               \
  }                                                                                                                                      \
  KERNEL(prefill_int8_##T##_##D##_##ROWS)
#if SCORE_OPTIONS
#define PREFILL_CODES_DIMS(T) PREFILL_CODES(T, 64, 64) PREFILL_CODES(T, 128, 64) PREFILL_CODES(T, 256, 64)
#else
#define PREFILL_CODES_DIMS(T) \
  PREFILL_CODES(T, 64, 64) PREFILL_CODES(T, 64, 128) PREFILL_CODES(T, 128, 64) PREFILL_CODES(T, 128, 128) PREFILL_CODES(T, 256, 64)
#endif
PREFILL_CODES_DIMS(f16)
PREFILL_CODES_DIMS(bf16)
