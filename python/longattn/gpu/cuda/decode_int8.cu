// Attention of a few query rows over long keys and values of 8-bit codes, a scale and an offset per row: see decode.cuh.
//
// A row is x = offset + scale * code. Codes less 128 go into the matrix products as they are, exactly; a key's scale and offset are
// applied to its score, a value's to its weight. Which channels a step of a product takes is free, so the queries follow the order
// in which keys lie in memory: a lane reads 16 codes of a key at once.
//
// Arguments beside those of decode.cuh: scale and offset of each key and value, [B, Hkv, most, 2], by strides of batch and head.

template <int DIM>
constexpr int CODED_STAGES = DIM > 128 ? 2 : 4;  // fewer of wide rows, for devices with less shared memory
constexpr int CODED_KEYS = 16;  // of a warp at a time

struct CodedBy {
  const float* parameters;
  i64 batch, head;
};

// Part of a stage: codes of 16 rows, then their scales and offsets.
template <int DIM>
struct CodedRows {
  static constexpr int BYTES = CODED_KEYS * DIM + CODED_KEYS * 8;
  u8* base;

  // Of a key: 8 lanes read two rows' 4 pieces at a time, which must not share banks.
  DEVICE u8* key_piece(int row, int piece) const { return base + row * DIM + (DIM > 64 ? piece ^ (row & 1) << 2 : piece) * 16; }
  DEVICE Tile<f16, DIM / 2> pairs() const { return {reinterpret_cast<f16*>(base)}; }
  DEVICE float* parameters() const { return reinterpret_cast<float*>(base + CODED_KEYS * DIM); }
};

template <int DIM, bool KEYS>
DEVICE void coded_load(const CodedRows<DIM>& to, const u8* codes, i64 stride, const float* parameters, const int* listed, int first, int end,
                       int lane) {
  int row = lane >> 1;  // two lanes a row
  bool valid = first + row < end;
  i64 at = valid ? (listed ? listed[first + row] : first + row) : 0;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) {
    int piece = (lane & 1) + 2 * i;
    void* place = KEYS ? static_cast<void*>(to.key_piece(row, piece)) : static_cast<void*>(to.pairs().piece(row, piece));
    copy_async(place, codes + at * stride + piece * 16, valid);
  }
  if (!(lane & 1)) copy8_async(to.parameters() + 2 * row, parameters + 2 * at, valid);
}

template <class T, int DIM>
DEVICE void decode_codes(const T* q, const u8* k, const u8* v, const int* listed, const Lengths& lengths, float* partial, float* lse, Strides k_by,
                         Strides v_by, int most, int split_keys, int all_rows, int positions, int left, int right, float scale,
                         const ScoreOptions& options, CodedBy k_coded, CodedBy v_coded) {
  constexpr int STEPS = DIM / 16, QUARTERS = DIM / 64;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane >> 2, in_group = lane & 3;
  const DecodePart<16, DIM> part(lengths, most, split_keys, all_rows, positions, left, right);
  const u8* keys = k + blockIdx.z * k_by.batch + part.head * k_by.head;
  const u8* values = v + blockIdx.z * v_by.batch + part.head * v_by.head;
  const float* of_keys = k_coded.parameters + blockIdx.z * k_coded.batch + part.head * k_coded.head;
  const float* of_values = v_coded.parameters + blockIdx.z * v_coded.batch + part.head * v_coded.head;
  const int* list = listed ? listed + part.batch_head * most : nullptr;

  // Step 4 S + t takes channels 64 S + 16 in_group + 4 t + 0, 2 in its lower half and 1, 3 in its upper.
  u32 q_parts[STEPS][4];
  float whole[2] = {0.f, 0.f};  // sums of the queries' channels
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = group + 8 * i;
#pragma unroll
    for (int e = 0; e < DIM / 32; e++) {
      Vector16<T> x = {};
      if (row < part.rows) x = load16(q + (part.first_row + row) * DIM + e / 2 * 64 + in_group * 16 + e % 2 * 8);
#pragma unroll
      for (int t = 0; t < 2; t++) {
        int step = e / 2 * 4 + e % 2 * 2 + t;
        q_parts[step][i] = x.at[4 * t].bits | static_cast<u32>(x.at[4 * t + 2].bits) << 16;
        q_parts[step][2 + i] = x.at[4 * t + 1].bits | static_cast<u32>(x.at[4 * t + 3].bits) << 16;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) whole[i] += to_float(x.at[j]);
    }
    whole[i] = lanes_sum<4>(whole[i]);
  }

  DYNAMIC_SHARED(shared);
  constexpr int STAGE = 2 * CodedRows<DIM>::BYTES, STAGES = CODED_STAGES<DIM>;
  u8* stages = shared + warp * STAGES * STAGE;
  auto fetch = [&](int stage, int at) {
    if (at < part.to) {
      coded_load<DIM, true>({stages + stage * STAGE}, keys, k_by.row, of_keys, list, at, part.to, lane);
      coded_load<DIM, false>({stages + stage * STAGE + STAGE / 2}, values, v_by.row, of_values, list, at, part.to, lane);
    }
    commit_async();
  };

  // o[2 p + odd] holds channels 16 p + 4 in_group + 2 j + odd, less what `offsets` adds to all channels.
  float o[DIM / 8][4], maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.f, 0.f}, offsets[2] = {0.f, 0.f};
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

  int first = part.from + warp * CODED_KEYS;
  constexpr int STRIDE = DECODE_WARPS * CODED_KEYS;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(s, first + s * STRIDE);
  int stage = 0;
  for (int at = first; at < part.to; at += STRIDE) {
    fetch((stage + STAGES - 1) % STAGES, at + (STAGES - 1) * STRIDE);
    wait_async<STAGES - 1>();
    __syncwarp();
    CodedRows<DIM> k_rows{stages + stage * STAGE}, v_rows{stages + stage * STAGE + STAGE / 2};

    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int quarter = 0; quarter < QUARTERS; quarter++) {
        Vector16<u32> codes = load16(reinterpret_cast<const u32*>(k_rows.key_piece(n * 8 + group, 4 * quarter + in_group)));
#pragma unroll
        for (int t = 0; t < 4; t++)
          multiply(scores[n], q_parts[4 * quarter + t], bytes_less_128(codes.at[t], T{}), bytes_less_128(codes.at[t] >> 8, T{}), T{});
      }
    float scaled[2][4];  // weights times the values' scales
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float row[4];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        Vector16<float> both = load16(k_rows.parameters() + 2 * (n * 8 + in_group * 2));  // of two keys
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int key = at + n * 8 + in_group * 2 + j;
          float scale_of = both.at[2 * j], centre = both.at[2 * j + 1] + 128.f * scale_of;
          bool seen = key >= sees_from[i] && key < sees_to[i];
          float product = scores[n][2 * i + j] * scale_of + whole[i] * centre;
          row[2 * n + j] = seen ? score_of(options, of_row[i], product, key) : -infinity();
        }
      }
      float shrink = softmax_step<4>(row, maxima[i], sums[i]);
      offsets[i] *= shrink;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        Vector16<float> both = load16(v_rows.parameters() + 2 * (n * 8 + in_group * 2));
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float weight = row[2 * n + j], scale_of = both.at[2 * j];
          bool counts = weight != 0.f;  // a value that a row does not see may be NaN
          scaled[n][2 * i + j] = counts ? weight * scale_of : 0.f;
          offsets[i] += counts ? weight * (both.at[2 * j + 1] + 128.f * scale_of) : 0.f;
        }
      }
    }
    u32 weights[4] = {pair_of<T>(scaled[0][0], scaled[0][1]), pair_of<T>(scaled[0][2], scaled[0][3]),
                      pair_of<T>(scaled[1][0], scaled[1][1]), pair_of<T>(scaled[1][2], scaled[1][3])};
#pragma unroll
    for (int d = 0; d < DIM / 32; d++) {
      u32 loaded[4];  // two channels of each of two rows
      load_matrices_transposed(loaded, v_rows.pairs().piece(lane & 15, 2 * d + (lane >> 4)));
#pragma unroll
      for (int p = 0; p < 2; p++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
          multiply(o[2 * (2 * d + p) + odd], weights, bytes_less_128(loaded[2 * p] >> 8 * odd, T{}),
                   bytes_less_128(loaded[2 * p + 1] >> 8 * odd, T{}), T{});
    }
    __syncwarp();  // the stage is free
    stage = (stage + 1) % STAGES;
  }
  wait_async<0>();
  __syncthreads();  // results take the stages' place

  float* to_maxima = reinterpret_cast<float*>(shared);
  float* to_sums = to_maxima + 16 * DECODE_WARPS;
  float* outputs = to_sums + 16 * DECODE_WARPS;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = lanes_sum<4>(sums[i]), added = lanes_sum<4>(offsets[i]);
    int to = (group + 8 * i) * DECODE_WARPS + warp;
    if (in_group == 0) {
      to_maxima[to] = maxima[i];
      to_sums[to] = sum;
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int j = 0; j < 2; j++) outputs[to * DIM + d / 2 * 16 + in_group * 4 + 2 * j + d % 2] = o[d][2 * i + j] + added;
  }
  part.merge(to_maxima, to_sums, outputs, DECODE_WARPS, options, partial, lse);
}

#define DECODE_CODES(T, D)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(DECODE_THREADS)                                                                  \
      decode_int8_##T##_##D(DECODE_ARGUMENTS(T, u8), const float* k_parameters, i64 k_parameters_batch, i64 k_parameters_head,   \
                            const float* v_parameters, i64 v_parameters_batch, i64 v_parameters_head) {                          \
    decode_codes<T, D>(DECODE_PASSED, {k_parameters, k_parameters_batch, k_parameters_head},                                      \
                       {v_parameters, v_parameters_batch, v_parameters_head});                                                   \
  }                                                                                                                              \
  KERNEL(decode_int8_##T##_##D)
DECODE_CODES(f16, 64)
DECODE_CODES(f16, 128)
DECODE_CODES(f16, 256)
DECODE_CODES(bf16, 64)
DECODE_CODES(bf16, 128)
DECODE_CODES(bf16, 256)
