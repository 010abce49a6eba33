// Partial results of disjoint sets of keys put together by their log-sum-exp: splits of a decode, sets of host and device.

// partial [heads, parts, D], lse [heads, parts] in natural logs; out [heads, D]. One block a head, a thread a channel.
template <class T>
DEVICE void merge_parts(const float* partial, const float* lse, T* out, float* out_lse, int parts, int dim) {
  i64 head = blockIdx.x;
  float most = -infinity();
  bool any = false;  // a part that is not empty, or NaN
  for (int p = 0; p < parts; p++) {
    most = fmaxf(most, lse[head * parts + p]);
    any = any || !(lse[head * parts + p] == -infinity());
  }
  float sum = 0.f;
  if (any)
    for (int p = 0; p < parts; p++) sum += __expf(lse[head * parts + p] - most);
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    float o = 0.f;
    if (any)
      for (int p = 0; p < parts; p++) {
        float weight = __expf(lse[head * parts + p] - most);
        // An empty part has weight 0 and may hold anything.
        if (weight > 0.f) o += weight * partial[(head * parts + p) * dim + d];
      }
    from_float(any ? o / sum : 0.f, out[head * dim + d]);
  }
  if (threadIdx.x == 0) out_lse[head] = any ? most + __logf(sum) : -infinity();
}

#define MERGE(T, NAME)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                                          \
      merge_##NAME(const float* partial, const float* lse, T* out, float* out_lse, int parts, int dim) { \
    merge_parts<T>(partial, lse, out, out_lse, parts, dim);                                                                  \
  }                                                                                                                          \
  KERNEL(merge_##NAME)
MERGE(float, f32)
MERGE(f16, f16)
MERGE(bf16, bf16)
