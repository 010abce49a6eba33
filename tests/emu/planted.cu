// Small kernels with one mistake each, and the same kernels without it (FIXED), to check the emulator's checks.
#ifdef FIXED
#define WRONG(wrong, right) right
#else
#define WRONG(wrong, right) wrong
#endif
#define PLANTED(name, ...) extern "C" __global__ void name(__VA_ARGS__)

PLANTED(barrier_skipped, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  if (threadIdx.x < WRONG(48, 64)) {
    s[threadIdx.x] = 1.f;
    __syncthreads();
  }
  out[threadIdx.x] = 1.f;
}
KERNEL(barrier_skipped)

PLANTED(two_barriers, float* out) {
#ifdef FIXED
  __syncthreads();
#else
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
#endif
  out[threadIdx.x] = 1.f;
}
KERNEL(two_barriers)

PLANTED(shuffle_in_a_branch, float* out) {
  float x = threadIdx.x;
  if (WRONG(threadIdx.x & 1, true)) x = __shfl_xor_sync(ALL_LANES, x, 2);
  out[threadIdx.x] = x;
}
KERNEL(shuffle_in_a_branch)

PLANTED(shuffles_in_two_branches, float* out) {
  float x = threadIdx.x;
#ifdef FIXED
  x = __shfl_xor_sync(ALL_LANES, x, 2);
#else
  if (threadIdx.x & 1)
    x = __shfl_xor_sync(ALL_LANES, x, 2);
  else
    x = __shfl_xor_sync(ALL_LANES, x, 4);
#endif
  out[threadIdx.x] = x;
}
KERNEL(shuffles_in_two_branches)

PLANTED(shuffle_from_outside_the_mask, float* out) {
  float x = threadIdx.x;
  if (threadIdx.x % 32 < 16) x = __shfl_sync(0xffffu, x, WRONG(20, 3));
  out[threadIdx.x] = x;
}
KERNEL(shuffle_from_outside_the_mask)

PLANTED(lane_outside_its_mask, float* out) {
  float x = threadIdx.x;
  if (threadIdx.x % 32 < WRONG(17, 16)) x = __shfl_sync(0xffffu, x, 3);
  out[threadIdx.x] = x;
}
KERNEL(lane_outside_its_mask)

PLANTED(misaligned_load, const float* in, float* out) {
  Vector16<float> x = load16(in + WRONG(1, 4) + threadIdx.x % 8 * 4);
  out[threadIdx.x] = x.at[0];
}
KERNEL(misaligned_load)

PLANTED(misaligned_copy, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  copy_async(s + threadIdx.x * 4, in + WRONG(1, 4) + threadIdx.x % 8 * 4, true);
  commit_async();
  wait_async<0>();
  out[threadIdx.x] = s[threadIdx.x * 4];
}
KERNEL(misaligned_copy)

PLANTED(misaligned_small_copy, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  copy8_async(s + threadIdx.x * 2, in + WRONG(1, 2) + threadIdx.x % 8 * 2, true);
  commit_async();
  wait_async<0>();
  out[threadIdx.x] = s[threadIdx.x * 2];
}
KERNEL(misaligned_small_copy)

PLANTED(misaligned_word, const float* in, float* out) {
  const u16* halves = reinterpret_cast<const u16*>(in) + WRONG(1, 2);
  out[threadIdx.x] = __int_as_float(*reinterpret_cast<const int*>(halves + threadIdx.x % 8 * 2));
}
KERNEL(misaligned_word)

PLANTED(nothing_written, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  if (threadIdx.x < WRONG(63, 64)) s[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
KERNEL(nothing_written)

PLANTED(input_written, const float* in, float* out) {
  if (WRONG(true, false)) const_cast<float*>(in)[threadIdx.x] = 1.f;
  out[threadIdx.x] = in[threadIdx.x];
}
KERNEL(input_written)

PLANTED(blocks_add_to_one_place, float* out) {
#ifdef FIXED
  atomicAdd(out + threadIdx.x, 1.f);
#else
  out[threadIdx.x] += 1.f;
#endif
}
KERNEL(blocks_add_to_one_place)

PLANTED(block_reads_anothers_result, float* out) {
  if (blockIdx.x == 0) out[threadIdx.x] = 1.f;
  if (blockIdx.x == 1 && WRONG(true, false)) out[64 + threadIdx.x] = out[threadIdx.x];
}
KERNEL(block_reads_anothers_result)

PLANTED(block_overwrites_what_another_read, float* out) {
  if (blockIdx.x == 0) out[64 + threadIdx.x] = out[threadIdx.x];
  if (blockIdx.x == 1 && WRONG(true, false)) out[threadIdx.x] = 1.f;
}
KERNEL(block_overwrites_what_another_read)

PLANTED(no_warp_barrier, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x] = threadIdx.x;
#ifdef FIXED
  __syncwarp();
#endif
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL(no_warp_barrier)

PLANTED(warp_barrier_for_a_block, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x] = threadIdx.x;
#ifdef FIXED
  __syncthreads();
#else
  __syncwarp();
#endif
  out[threadIdx.x] = s[threadIdx.x ^ 32];
}
KERNEL(warp_barrier_for_a_block)

PLANTED(overwritten_while_others_read, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float x = s[(threadIdx.x + 1) % 64];
#ifdef FIXED
  __syncthreads();
#endif
  s[threadIdx.x] = 0.f;
  out[threadIdx.x] = x;
}
KERNEL(overwritten_while_others_read)

PLANTED(count_without_atomics, int* out) {
  DYNAMIC_SHARED(shared);
  int* s = reinterpret_cast<int*>(shared);
  if (threadIdx.x < 4) s[threadIdx.x] = 0;
  __syncthreads();
#ifdef FIXED
  atomicAdd(s + threadIdx.x % 4, 1);
#else
  s[threadIdx.x % 4]++;
#endif
  __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = s[threadIdx.x];
}
KERNEL(count_without_atomics)

PLANTED(read_past_the_end, const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + WRONG(1, 0)]; }
KERNEL(read_past_the_end)

PLANTED(write_past_the_end, float* out) { out[threadIdx.x + WRONG(1, 0)] = 1.f; }
KERNEL(write_past_the_end)

PLANTED(shared_past_the_end, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x + WRONG(193, 192)] = 1.f;
  out[threadIdx.x] = s[threadIdx.x + WRONG(193, 192)];
}
KERNEL(shared_past_the_end)

PLANTED(copy_not_waited_for, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  copy_async(s + threadIdx.x * 4, in + threadIdx.x % 8 * 4, true);
  commit_async();
#ifdef FIXED
  wait_async<0>();
#endif
  out[threadIdx.x] = s[threadIdx.x * 4];
  wait_async<0>();
}
KERNEL(copy_not_waited_for)

PLANTED(wait_for_the_wrong_group, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  copy_async(s + threadIdx.x * 4, in, true);
  commit_async();
  wait_async<WRONG(1, 0)>();
  out[threadIdx.x] = s[threadIdx.x * 4];
  wait_async<0>();
}
KERNEL(wait_for_the_wrong_group)

PLANTED(copy_never_waited_for, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  copy_async(shared + threadIdx.x * 16, in, true);
  commit_async();
#ifdef FIXED
  wait_async<0>();
#endif
  out[threadIdx.x] = 1.f;
}
KERNEL(copy_never_waited_for)

PLANTED(copy_seen_without_a_barrier, const float* in, float* out) {
  DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  copy_async(s + threadIdx.x * 4, in, true);
  commit_async();
  wait_async<0>();
#ifdef FIXED
  __syncthreads();
#endif
  out[threadIdx.x] = s[(threadIdx.x ^ 33) * 4];
}
KERNEL(copy_seen_without_a_barrier)

PLANTED(matrix_rows_not_aligned, float* out) {
  DYNAMIC_SHARED(shared);
  u16* s = reinterpret_cast<u16*>(shared);
  for (int i = threadIdx.x; i < 512; i += 64) s[i] = 0;
  __syncthreads();
  u32 parts[4];
  load_matrices(parts, s + threadIdx.x % 32 * 8 + WRONG(1, 0));
  out[threadIdx.x] = static_cast<float>(parts[0]);
}
KERNEL(matrix_rows_not_aligned)
