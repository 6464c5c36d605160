// Device code that knows no loss: columns of a row as 16-byte pieces, reductions over a warp, a block, a cluster.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "../row_math.h"
#include "plan.h"

namespace trapo::cuda {

// The block's dynamic shared memory. tests/simt, where this file runs on a CPU, has its own.
#if defined(TRAPO_SIMT)
using simt::dynamic_shared;
#else
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

// Columns --------------------------------------------------------------------------------------------------------

template <class T>
struct Stats {
  using Type = float;
};
template <>
struct Stats<double> {
  using Type = double;
};
template <class T>
using Acc = typename Stats<T>::Type;

template <class T>
struct alignas(kPiece) Piece {
  static constexpr int kCount = kPiece / sizeof(T);
  T x[kCount];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two neighbours at once: one instruction for 16-bit types.
__device__ __forceinline__ void narrow(float a, float b, float* out) { out[0] = a, out[1] = b; }
__device__ __forceinline__ void narrow(double a, double b, double* out) { out[0] = a, out[1] = b; }
__device__ __forceinline__ void narrow(float a, float b, __half* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  out[0] = pair.x, out[1] = pair.y;
}
__device__ __forceinline__ void narrow(float a, float b, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  out[0] = pair.x, out[1] = pair.y;
}

template <class T>
__device__ __forceinline__ T narrowed(Acc<T> value) {
  T pair[2];
  narrow(value, value, pair);
  return pair[0];
}

template <class T>
__device__ __forceinline__ Piece<T> filled(Acc<T> value) {
  Piece<T> out;
#pragma unroll
  for (int k = 0; k < Piece<T>::kCount; k += 2) narrow(value, value, out.x + k);
  return out;
}

// One store of 16 bytes; left to itself nvcc makes four of them for sm_80 and sm_90.
template <class T>
__device__ __forceinline__ void put(Piece<T>* at, const Piece<T>& piece) {
  const uint4& words = reinterpret_cast<const uint4&>(piece);
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(at) = words;
#endif
}

// A product that no compiler merges with the sum it goes into: cap · tanh − m must be 0 where m is that product.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
#else
template <class A>
A product(A a, A b) { return a * b; }
#endif

// For d ≤ 0. At most 2 + 1.17 |d| units in the last place off, by CUDA's documentation.
__device__ __forceinline__ float fast_exp(float d) { return __expf(d); }
__device__ __forceinline__ double fast_exp(double d) { return exp(d); }

// A row as pieces, counted from where a line begins. Pieces [lo, hi) hold columns alone. The up to 2 · (16 / size − 1)
// columns before and after them, the edges, belong to one thread each.
template <class T>
struct Row {
  static constexpr int kCount = Piece<T>::kCount;
  T* base;         // where the line of the first column begins
  int first, end;  // the columns are base[first .. end)
  int lo, hi;

  __device__ __forceinline__ Row(T* x, int vocab) {
    first = int(reinterpret_cast<uintptr_t>(x) % kLine / sizeof(T));
    base = x - first;
    end = first + vocab;
    lo = (first + kCount - 1) / kCount;
    hi = end / kCount;
  }
  __device__ __forceinline__ Piece<T>* piece(int at) const { return reinterpret_cast<Piece<T>*>(base + at * kCount); }
  __device__ __forceinline__ bool whole(int at) const { return at >= lo && at < hi; }

  // The edge column of a thread as an index of base, or −1.
  __device__ __forceinline__ int edge(int thread) const {
    const int before = min(lo * kCount, end), after = max(hi * kCount, before);
    if (first + thread < before) return first + thread;
    const int at = after + thread - (before - first);
    return at >= after && at < end ? at : -1;
  }
};

// Reductions -----------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What the threads of a block tell each other, at the start of its shared memory.
template <class A>
struct Scratch {
  RowState<A> warps[kLargestBlock / kWarp];
  RowState<A> block;
  A target;
};
template <class A>
constexpr int kScratch = int(round_up(sizeof(Scratch<A>), kPiece));

// The merged state of a warp, the same bits in every lane.
template <class A>
__device__ __forceinline__ RowState<A> warp_state(RowState<A> state) {
  A max = state.max;
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) max = max_nan(max, __shfl_xor_sync(kAllLanes, max, by));
  const int holders = __popc(__ballot_sync(kAllLanes, state.max == max && !none(max)));
  state = shifted(state, max);
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    state.rest += __shfl_xor_sync(kAllLanes, state.rest, by);
    state.dot += __shfl_xor_sync(kAllLanes, state.dot, by);
  }
  state.rest += ties<A>(holders);
  return state;
}

// Of a block, in every thread. Also a barrier.
template <class A>
__device__ __forceinline__ RowState<A> block_state(RowState<A> state, Scratch<A>& scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  state = warp_state(state);
  if (lane == 0) scratch.warps[warp] = state;
  __syncthreads();
  return warp_state(lane < warps ? scratch.warps[lane] : RowState<A>{});
}

// Clusters exist from sm_90 on; the plan asks for none elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
__device__ __forceinline__ const T* of_block(const T* mine, int) { return mine; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
#else
// Where another block of the cluster has what is at `mine` here.
template <class T>
__device__ __forceinline__ const T* of_block(const T* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(mine), rank);
}
__device__ __forceinline__ void cluster_arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { cooperative_groups::cluster_group::barrier_wait(); }
#endif

}  // namespace trapo::cuda
