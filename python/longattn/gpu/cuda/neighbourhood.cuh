// Tokens on a grid of up to three axes, each seeing the window around it: the pattern of neighbourhood attention.
//
// A block has one tile of query tokens and goes over the tiles of key tokens that hold any of their windows. Tiles are boxes of 64
// tokens of one dilation group: neighbours in their group, whatever lies between them on the grid. An axis that is not there has
// length 1.

// One axis. Token x has the place u = x / dilation in its group x % dilation; see longattn.sparse for the rule of windows.
struct GridAxis {
  int length, window, stride, dilation, causal, bits;  // a tile has 2^bits tokens

  DEVICE int tiles() const { return ((length + dilation - 1) / dilation + (1 << bits) - 1) >> bits; }
  DEVICE int count(int group) const { return (length - group + dilation - 1) / dilation; }
  // First place that a token sees, and the one after the last.
  DEVICE int from(int u, int count) const {
    if (causal) return max(min(stride * (u / stride) + stride - 1, count - 1) - window + 1, 0);
    int left = window / 2, leader = min(stride * (u / stride) + stride / 2, count - 1);
    return min(max(leader, left), count - window + left) - left;
  }
  DEVICE int to(int u, int count) const { return causal ? u + 1 : from(u, count) + window; }
};

struct Grid {
  static constexpr int AXES = 3;
  static constexpr bool KEEPS_ROWS = true;
  struct Place {
    int first[AXES];  // of a tile of keys, in its group
  };
  struct Row {
    int from[AXES], to[AXES];
  };
  GridAxis axis[AXES];
  int group[AXES], first[AXES], low[AXES], high[AXES], count[AXES];  // low, high: tiles of keys
  int from, until;

  // Tile `number` of queries.
  DEVICE Grid(const GridAxis (&axes)[AXES], int number) {
    from = 0;
    until = 1;
#pragma unroll
    for (int a = AXES - 1; a >= 0; a--) {
      axis[a] = axes[a];
      int tiles = axis[a].tiles(), both = number % (tiles * axis[a].dilation);
      number /= tiles * axis[a].dilation;
      group[a] = both / tiles;
      first[a] = both % tiles << axis[a].bits;
      count[a] = axis[a].count(group[a]);
      // Windows never begin before those of tokens before them, nor end.
      int last = min(first[a] + (1 << axis[a].bits), count[a]) - 1;
      if (first[a] < count[a]) {
        low[a] = axis[a].from(first[a], count[a]) >> axis[a].bits;
        high[a] = (axis[a].to(last, count[a]) + (1 << axis[a].bits) - 1) >> axis[a].bits;
      } else {
        low[a] = high[a] = 0;  // a group that is a tile shorter than another
      }
      until *= high[a] - low[a];
    }
  }
  DEVICE Place at(int c) const {
    Place place;
#pragma unroll
    for (int a = AXES - 1; a >= 0; a--) {
      int across = high[a] - low[a];
      place.first[a] = (low[a] + c % across) << axis[a].bits;
      c /= across;
    }
    return place;
  }
  // Where token j of a tile lies along an axis.
  DEVICE int along(int a, int j) const {
#pragma unroll
    for (int b = AXES - 1; b > a; b--) j >>= axis[b].bits;
    return j & ((1 << axis[a].bits) - 1);
  }
  DEVICE i64 token(const int (&tile)[AXES], int j) const {
    i64 number = 0;
    bool valid = true;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      int u = tile[a] + along(a, j);
      valid = valid && u < count[a];
      number = number * axis[a].length + group[a] + static_cast<i64>(axis[a].dilation) * u;
    }
    return valid ? number : -1;
  }
  DEVICE i64 query(int r) const { return token(first, r); }
  DEVICE i64 key(const Place& place, int j) const { return token(place.first, j); }
  DEVICE int number(const Place& place, int j) const { return static_cast<int>(key(place, j)); }
  DEVICE int position(int r) const { return static_cast<int>(query(r)); }
  DEVICE bool reaches(const Place&, int) const { return true; }
  DEVICE bool whole(const Place&) const { return false; }  // a window has another shape than a tile
  DEVICE Row row(int r) const {
    Row made;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      int u = first[a] + along(a, r);
      made.from[a] = u < count[a] ? axis[a].from(u, count[a]) : 0;
      made.to[a] = u < count[a] ? axis[a].to(u, count[a]) : 0;
    }
    return made;
  }
  DEVICE bool sees(const Row& row, const Place& place, int j) const {
    bool seen = true;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      int u = place.first[a] + along(a, j);
      seen = seen && u >= row.from[a] && u < row.to[a];
    }
    return seen;
  }
};

// Arguments: q, k, v, out [B, H, tokens, D] by strides in elements, last axis contiguous; per axis its length, window, stride,
// dilation, whether it is causal, and log2 of the tokens of a tile along it. lse [B, Hq, tokens]. Grid: tiles, query heads, batch.
#define GRID_ARGUMENTS(T)                                                                                                       \
  const T *q, const T *k, const T *v, T *out, float *lse, i64 q_batch, i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, \
      i64 v_batch, i64 v_head, i64 v_row, i64 out_batch, i64 out_head, i64 out_row, int heads_per_kv, int length0, int window0,  \
      int stride0, int dilation0, int causal0, int bits0, int length1, int window1, int stride1, int dilation1, int causal1,    \
      int bits1, int length2, int window2, int stride2, int dilation2, int causal2, int bits2, float scale, SCORE_ARGUMENTS
#define GRID_MADE(T)                                                                                                              \
  const GridAxis axes[3] = {{length0, window0, stride0, dilation0, causal0, bits0},                                               \
                            {length1, window1, stride1, dilation1, causal1, bits1},                                               \
                            {length2, window2, stride2, dilation2, causal2, bits2}};                                              \
  const Grid pattern(axes, blockIdx.x);                                                                                           \
  i64 batch = blockIdx.z, head = blockIdx.y, kv_head = blockIdx.y / heads_per_kv;                                                 \
  const Operands<T> operands{q + batch * q_batch + head * q_head,                                                                 \
                             {k + batch * k_batch + kv_head * k_head, k_row},                                                     \
                             {v + batch * v_batch + kv_head * v_head, v_row},                                                     \
                             out + batch * out_batch + head * out_head,                                                           \
                             lse + (batch * gridDim.y + head) * length0 * length1 * length2,                                      \
                             q_row, out_row, nullptr, nullptr};                                                                   \
  if (pattern.until == 0) return;
