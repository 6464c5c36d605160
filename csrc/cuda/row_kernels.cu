// Row kernels for NVIDIA GPUs: statistics and in-place gradient of rows of logits x [C, V], fp32, fp64, bf16 or fp16.
//
//     stats            m = max z, Σ e^(z−m) without one column at m, Σ e^(z−m)(z−m), z_y
//     grad             x_j becomes e^(d_j) (slope · d_j + constant), the target its own value (row_math.h)
//     fused_on_chip    both, with the slopes of the built-in terms between them; the row waits in shared memory
//     fused_streamed   the same where it does not fit: the row is read again, backwards, from what L2 still has of it
//
// A block, or on sm_90 and newer a cluster of blocks, has a row. Memory traffic per logit: stats one read; grad a read and
// a write; fused_on_chip a read and a write; fused_streamed up to two reads and a write. FLOPs per logit: one exp and
// about 4 more for statistics, the same again for a gradient; a tanh each with a soft-cap.
//
// Every thread keeps to the pieces of 16 bytes that it copied itself, so the row needs no barrier, only the reductions do.
// Their order depends on the plan alone: results are equal from run to run.
#include <stdexcept>
#include <string>

#include "device.h"
#include "launch.h"
#include "row_kernels.h"

namespace trapo::cuda {
namespace {

template <class A, bool kCap>
struct SoftCap {
  A cap, inverse;

  __device__ __forceinline__ A tangent(A x) const { return std::tanh(x * inverse); }
  __device__ __forceinline__ A logit(A x) const {
    if constexpr (!kCap) return x;
    return product(cap, tangent(x));
  }
};

template <class T>
struct Rows {
  T* x;
  int64_t stride;
  const int64_t* targets;
  int vocab;
  Acc<T> cap, inverse_cap;

  template <bool kCap>
  __device__ __forceinline__ SoftCap<Acc<T>, kCap> soft_cap() const { return {cap, inverse_cap}; }
};

// The index of the target in Row::base; one that no column has where the target is not in [0, V).
constexpr int kNowhere = -2 * kLine;
template <class T>
__device__ __forceinline__ int target_of(const Rows<T>& rows, const Row<T>& row, int64_t i) {
  const int64_t y = rows.targets[i];
  return y >= 0 && y < rows.vocab ? row.first + int(y) : kNowhere;
}

// Statistics -----------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ Acc<T> larger(Acc<T> top, const Piece<T>& piece) {
#pragma unroll
  for (int k = 0; k < Piece<T>::kCount; ++k) top = max_nan(top, widen(piece.x[k]));
  return top;
}

// A thread's state while columns are added to it.
template <class A, bool kCap>
struct Adding {
  const SoftCap<A, kCap>& cap;
  RowState<A> state;
  A shift;
  int at_max;  // columns at the maximum, beside the one that is left out

  // `top`: the largest of the columns that will be added, of which there is one at least. The soft-cap is monotone, so it is taken before it.
  __device__ __forceinline__ Adding(const RowState<A>& before, A top, const SoftCap<A, kCap>& cap) : cap(cap) {
    const A max = max_nan(before.max, cap.logit(top));
    at_max = before.max == max ? 0 : -1;
    state = shifted(before, max), shift = shift_of(max);
  }
  __device__ __forceinline__ void add(A x) {
    const A d = cap.logit(x) - shift, e = fast_exp(d);
    const bool top = d == 0;
    at_max += top;
    state.rest += top ? A(0) : e;
    state.dot += e * std::fmax(d, A(kFloor));
  }
  template <class T>
  __device__ __forceinline__ void add(const Piece<T>& piece) {
#pragma unroll
    for (int k = 0; k < Piece<T>::kCount; ++k) add(widen(piece.x[k]));
  }
  __device__ __forceinline__ RowState<A> added() const {
    RowState<A> out = state;
    if (at_max > 0) out.rest += A(at_max);
    return out;
  }
};

// The state of a thread's edge column alone.
template <class T, bool kCap>
__device__ __forceinline__ RowState<Acc<T>> edge_state(bool has_edge, Acc<T> x, const SoftCap<Acc<T>, kCap>& cap) {
  RowState<Acc<T>> state;
  if (has_edge) state.max = cap.logit(x);
  return state;
}

// Pieces that a thread has on their way at once where the row is not kept.
constexpr int kBatch = 2;

template <class T, bool kCap>
__device__ __forceinline__ RowState<Acc<T>> read_state(const Row<T>& row, const SoftCap<Acc<T>, kCap>& cap) {
  using A = Acc<T>;
  const A nothing = -std::numeric_limits<A>::infinity();
  const int edge = row.edge(threadIdx.x), threads = blockDim.x;
  RowState<A> state = edge_state<T>(edge >= 0, edge >= 0 ? widen(row.base[edge]) : nothing, cap);
  for (int at = threadIdx.x; at < row.hi; at += kBatch * threads) {
    Piece<T> pieces[kBatch];
    const auto each = [&](auto f) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (row.whole(at + u * threads)) f(pieces[u], at + u * threads);
    };
    each([&](Piece<T>& piece, int mine) { piece = *row.piece(mine); });
    A top = nothing;
    bool any = false;
    each([&](Piece<T>& piece, int) { top = larger(top, piece), any = true; });
    if (!any) continue;
    Adding<A, kCap> adding(state, top, cap);
    each([&](Piece<T>& piece, int) { adding.add(piece); });
    state = adding.added();
  }
  return state;
}

template <class T, bool kCap>
__device__ __forceinline__ Acc<T> read_target(const Row<T>& row, int target, const SoftCap<Acc<T>, kCap>& cap) {
  if (target == kNowhere) return std::numeric_limits<Acc<T>>::quiet_NaN();
  return cap.logit(widen(row.base[target]));
}

// Gradient -------------------------------------------------------------------------------------------------------

template <class T, bool kCap>
struct Gradient {
  using A = Acc<T>;
  SoftCap<A, kCap> cap;
  A shift, constant, slope, at_target;
  bool zero;

  __device__ __forceinline__ Gradient(SoftCap<A, kCap> cap, const RowStats<A>& row, const Slopes<A>& g, bool entropy)
      : cap(cap), shift(row.max), zero(g.logprob == 0 && g.entropy == 0) {
    const RowGradient<A> gradient = gradient_of(row, g, entropy);
    constant = gradient.constant, slope = gradient.slope, at_target = gradient.at_target;
  }

  __device__ __forceinline__ A of(A x, bool target) const {
    A tangent = 0, z = x;
    if constexpr (kCap) tangent = cap.tangent(x), z = product(cap.cap, tangent);
    const A d = z - shift;
    const A dz = target ? at_target : fast_exp(d) * (slope * std::fmax(d, A(kFloor)) + constant);
    return kCap ? dz * (1 - tangent * tangent) : dz;
  }

  // `target`: its index in the piece, any other number where it is elsewhere.
  __device__ __forceinline__ Piece<T> of(const Piece<T>& piece, int target) const {
    constexpr int kCount = Piece<T>::kCount;
    if (zero) return filled<T>(0);
    A dz[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) dz[k] = of(widen(piece.x[k]), false);
    if (target >= 0 && target < kCount) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) dz[k] = k == target ? of(widen(piece.x[k]), true) : dz[k];
    }
    Piece<T> out;
#pragma unroll
    for (int k = 0; k < kCount; k += 2) narrow(dz[k], dz[k + 1], out.x + k);
    return out;
  }
};

template <class T, bool kCap>
__device__ __forceinline__ void write_edge(const Row<T>& row, const Gradient<T, kCap>& gradient, int edge, Acc<T> x,
                                           int target) {
  if (edge >= 0) row.base[edge] = narrowed<T>(gradient.zero ? 0 : gradient.of(x, edge == target));
}

// Reads and writes the row, from its end, where what was read last still is in the caches; or writes zeros.
template <class T, bool kCap>
__device__ __forceinline__ void write_gradient(const Row<T>& row, const Gradient<T, kCap>& gradient, int target) {
  const int threads = blockDim.x, batch = kBatch * threads, edge = row.edge(threadIdx.x);
  for (int first = (row.hi - 1) / batch * batch; first >= 0; first -= batch) {
    const int at = first + int(threadIdx.x);
    Piece<T> pieces[kBatch];
    const auto each = [&](auto f) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (row.whole(at + u * threads)) f(pieces[u], at + u * threads);
    };
    if (!gradient.zero) each([&](Piece<T>& piece, int mine) { piece = *row.piece(mine); });
    each([&](Piece<T>& piece, int mine) { put(row.piece(mine), gradient.of(piece, target - mine * Row<T>::kCount)); });
  }
  write_edge(row, gradient, edge, edge >= 0 ? widen(row.base[edge]) : Acc<T>(0), target);
}

// Kernels --------------------------------------------------------------------------------------------------------

template <class A>
struct State {
  A *max, *rest, *dot, *target;  // [C] each
};

template <class T, bool kCap>
__global__ void __launch_bounds__(max_threads(sizeof(T))) stats_kernel(Rows<T> rows, State<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t i = blockIdx.x;
  const Row<T> row(rows.x + i * rows.stride, rows.vocab);
  const auto cap = rows.template soft_cap<kCap>();
  auto& scratch = *reinterpret_cast<Scratch<A>*>(dynamic_shared());
  const RowState<A> state = block_state(read_state(row, cap), scratch);
  if (threadIdx.x != 0) return;
  out.max[i] = state.max, out.rest[i] = state.rest, out.dot[i] = state.dot;
  out.target[i] = read_target(row, target_of(rows, row, i), cap);
}

template <class A>
struct GivenGradient {
  const A *logprob, *max, *log_sum, *entropy, *g_logprob, *g_entropy;
};

template <class T, bool kCap>
__global__ void __launch_bounds__(max_threads(sizeof(T))) grad_kernel(Rows<T> rows, GivenGradient<Acc<T>> in) {
  using A = Acc<T>;
  const int64_t i = blockIdx.x;
  const Row<T> row(rows.x + i * rows.stride, rows.vocab);
  const RowStats<A> stats{in.logprob[i], in.max[i], in.log_sum[i], in.entropy ? in.entropy[i] : A(0)};
  const Slopes<A> g{in.g_logprob[i], in.g_entropy ? in.g_entropy[i] : A(0)};
  const Gradient<T, kCap> gradient(rows.template soft_cap<kCap>(), stats, g, in.g_entropy != nullptr);
  write_gradient(row, gradient, target_of(rows, row, i));
}

template <class A>
struct Tokens {
  const bool* expert;
  const A *advantages, *old_logprobs, *ref_logprobs, *rollout_logprobs, *weights, *target_logits;  // each may be missing
  Terms<A> terms;
  A scale;

  __device__ __forceinline__ Token<A> at(int64_t i) const {
    const auto value = [i](const A* of) { return of != nullptr ? of[i] : A(0); };
    return {expert[i], old_logprobs != nullptr, value(advantages), value(old_logprobs), value(ref_logprobs),
            value(rollout_logprobs), weights != nullptr ? weights[i] : A(1)};
  }
  __device__ __forceinline__ A exact_target(int64_t i) const { return target_logits != nullptr ? target_logits[i] : A(0); }
  // Of a row whose target was read as `target`; `exact` as above.
  __device__ __forceinline__ RowStats<A> finished(const RowState<A>& state, A target, A exact) const {
    if (target_logits == nullptr) return finish(state, target);
    const RowState<A> better = with_target(state, target, exact);
    return finish(better, exact);
  }
  __device__ __forceinline__ Slopes<A> slopes_of(const Token<A>& token, const RowStats<A>& row) const {
    const Slopes<A> g = slopes(terms, token, row);
    return {g.logprob * scale, g.entropy * scale};
  }
};

template <class A>
struct Found {
  A *logprob, *max, *log_sum, *entropy;  // [C] each

  __device__ __forceinline__ void put(int64_t i, const RowStats<A>& row) const {
    logprob[i] = row.logprob, max[i] = row.max, log_sum[i] = row.log_sum, entropy[i] = row.entropy;
  }
};

template <class T, bool kCap>
__global__ void __launch_bounds__(max_threads_of_long_row(sizeof(T)))
    fused_streamed(Rows<T> rows, Tokens<Acc<T>> tokens, Found<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t i = blockIdx.x;
  const Row<T> row(rows.x + i * rows.stride, rows.vocab);
  const auto cap = rows.template soft_cap<kCap>();
  const int target = target_of(rows, row, i);
  auto& scratch = *reinterpret_cast<Scratch<A>*>(dynamic_shared());
  const Token<A> token = tokens.at(i);
  const A z_target = read_target(row, target, cap), exact = tokens.exact_target(i);
  // The barrier in it stands between the reading of the target and its writing.
  const RowStats<A> stats = tokens.finished(block_state(read_state(row, cap), scratch), z_target, exact);
  if (threadIdx.x == 0) out.put(i, stats);
  const Gradient<T, kCap> gradient(cap, stats, tokens.slopes_of(token, stats), tokens.terms.entropy_coef != 0);
  write_gradient(row, gradient, target);
}

// The part of a row that a block of the cluster keeps: slot s holds piece rank · slots + s, from `lo` to `hi`.
template <class T>
struct Part {
  Row<T> row;
  Piece<T>* slots;
  int start, lo, hi;

  __device__ __forceinline__ Part(const Row<T>& row, Piece<T>* slots, int count, int rank)
      : row(row), slots(slots), start(rank * count), lo(max(row.lo - start, 0)), hi(min(row.hi - start, count)) {}

  // f(slot) for those of this thread, of the `stage`-th of stages of `size` slots each.
  template <class F>
  __device__ __forceinline__ void each(int stage, int size, F f) const {
    const int end = min(hi, (stage + 1) * size);
    for (int slot = stage * size + int(threadIdx.x); slot < end; slot += blockDim.x)
      if (slot >= lo) f(slot);
  }
  __device__ __forceinline__ void load(int stage, int size) const {
    each(stage, size, [&](int slot) { __pipeline_memcpy_async(slots + slot, row.piece(start + slot), kPiece); });
    __pipeline_commit();
  }
  template <bool kCap>
  __device__ __forceinline__ void reduce(RowState<Acc<T>>& state, int stage, int size,
                                         const SoftCap<Acc<T>, kCap>& cap) const {
    Acc<T> top = -std::numeric_limits<Acc<T>>::infinity();
    bool any = false;
    each(stage, size, [&](int slot) { top = larger(top, slots[slot]), any = true; });
    if (!any) return;
    Adding<Acc<T>, kCap> adding(state, top, cap);
    each(stage, size, [&](int slot) { adding.add(slots[slot]); });
    state = adding.added();
  }
  // Whether this thread keeps a column; the block's rank is known to be the right one.
  __device__ __forceinline__ bool keeps(int column) const {
    const int slot = column / Row<T>::kCount - start;
    return column >= 0 && slot >= lo && slot < hi && slot % blockDim.x == threadIdx.x;
  }
  __device__ __forceinline__ T kept(int column) const {
    return slots[column / Row<T>::kCount - start].x[column % Row<T>::kCount];
  }
};

template <class T, bool kCap>
// Three blocks an SM, as in the best choices of plan.h; two where three would leave too few registers.
__global__ void __launch_bounds__(max_threads(sizeof(T)), sizeof(T) == 8 && kCap ? 2 : 3)
    fused_on_chip(Rows<T> rows, Tokens<Acc<T>> tokens, Found<Acc<T>> out, Plan plan) {
  using A = Acc<T>;
  const int rank = blockIdx.x % plan.cluster;
  const int64_t i = blockIdx.x / plan.cluster;
  const Row<T> row(rows.x + i * rows.stride, rows.vocab);
  auto& scratch = *reinterpret_cast<Scratch<A>*>(dynamic_shared());
  const Part<T> part(row, reinterpret_cast<Piece<T>*>(dynamic_shared() + kScratch<A>), plan.slots, rank);
  const int stage_size = int(round_up(div_up(plan.slots, plan.stages), blockDim.x));
#pragma unroll
  for (int stage = 0; stage < kMaxStages; ++stage) part.load(stage, stage_size);

  // What else the row needs, while its logits are on their way.
  const auto cap = rows.template soft_cap<kCap>();
  const int target = target_of(rows, row, i), edge = rank == 0 ? row.edge(threadIdx.x) : -1;
  const A x_edge = edge >= 0 ? widen(row.base[edge]) : A(0), exact = tokens.exact_target(i);
  const Token<A> token = tokens.at(i);

  RowState<A> state = edge_state<T>(edge >= 0, x_edge, cap);
#pragma unroll
  for (int stage = 0; stage < kMaxStages; ++stage) {
    __pipeline_wait_prior(kMaxStages - 1 - stage);
    part.reduce(state, stage, stage_size, cap);
  }
  if (part.keeps(target)) scratch.target = cap.logit(widen(part.kept(target)));
  if (edge >= 0 && edge == target) scratch.target = cap.logit(x_edge);
  if (target == kNowhere && threadIdx.x == 0) scratch.target = std::numeric_limits<A>::quiet_NaN();
  state = block_state(state, scratch);

  A z_target;
  if (plan.cluster == 1) {
    z_target = scratch.target;
  } else {
    if (threadIdx.x == 0) scratch.block = state;
    cluster_arrive();
    cluster_wait();
    const int lane = threadIdx.x % kWarp, piece = target / Row<T>::kCount;
    state = warp_state(lane < plan.cluster ? *of_block(&scratch.block, lane) : RowState<A>{});
    z_target = *of_block(&scratch.target, row.whole(piece) ? piece / plan.slots : 0);
    cluster_arrive();
  }

  const RowStats<A> stats = tokens.finished(state, z_target, exact);
  if (rank == 0 && threadIdx.x == 0) out.put(i, stats);
  const Gradient<T, kCap> gradient(cap, stats, tokens.slopes_of(token, stats), tokens.terms.entropy_coef != 0);
  part.each(0, plan.slots, [&](int slot) {
    const int piece = part.start + slot;
    put(row.piece(piece), gradient.of(part.slots[slot], target - piece * Row<T>::kCount));
  });
  write_edge(row, gradient, edge, x_edge, target);
  if (plan.cluster > 1) cluster_wait();  // no block leaves while another reads its shared memory
}

// Launches -------------------------------------------------------------------------------------------------------

// run(a value of the dtype)
template <class F>
void with_dtype(Dtype dtype, F run) {
  if (dtype == Dtype::kFloat32) return run(float{});
  if (dtype == Dtype::kFloat64) return run(double{});
  if (dtype == Dtype::kFloat16) return run(__half{});
  return run(__nv_bfloat16{});
}

template <class T>
Rows<T> rows_of(const Logits& logits) {
  if (logits.vocab < 1 || logits.vocab > (1 << 30))
    throw std::runtime_error("trapo_kernels: the vocabulary must be in [1, 2^30]; got " + std::to_string(logits.vocab));
  const double cap = logits.cap;
  return {static_cast<T*>(logits.data), logits.stride, logits.targets, int(logits.vocab), Acc<T>(cap),
          cap == 0 ? Acc<T>(0) : Acc<T>(1 / cap)};
}

template <class A>
A* of(void* vector) { return static_cast<A*>(vector); }
template <class A>
const A* of(const void* vector) { return static_cast<const A*>(vector); }

template <class A>
Terms<A> terms_of(const Terms<double>& t) {
  return {t.expert,       t.policy,       A(t.expert_coef),  A(t.alpha),   A(t.luffy_gamma), A(t.clip_low),
          A(t.clip_high), A(t.dual_clip), A(t.entropy_coef), A(t.kl_coef), A(t.tis_cap)};
}

Device current_device() {
  int id = 0, major = 0, minor = 0, shared = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&id), cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id),
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id)})
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("trapo_kernels: the CUDA device cannot be asked: ") + cudaGetErrorString(error));
  return {10 * major + minor, shared};
}

}  // namespace

Plan plan_of_fused(int64_t vocab, Dtype dtype) {
  Plan plan{};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    plan = fused_plan(vocab, sizeof(T), kScratch<Acc<T>>, current_device());
  });
  return plan;
}

void stats(const Logits& logits, const StateOut& out) {
  with_dtype(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Call call{"stats", logits, streamed_plan(logits.vocab, sizeof(T), kScratch<A>, max_threads(sizeof(T)))};
    const State<A> state{of<A>(out.max), of<A>(out.rest), of<A>(out.dot), of<A>(out.target)};
    call.launch(logits.cap != 0 ? stats_kernel<T, true> : stats_kernel<T, false>, rows_of<T>(logits), state);
  });
}

void grad(const Logits& logits, const GradIn& in) {
  with_dtype(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Call call{"grad_", logits, streamed_plan(logits.vocab, sizeof(T), 0, max_threads(sizeof(T)))};
    const GivenGradient<A> given{of<A>(in.logprob), of<A>(in.max),       of<A>(in.log_sum),
                                 of<A>(in.entropy), of<A>(in.g_logprob), of<A>(in.g_entropy)};
    call.launch(logits.cap != 0 ? grad_kernel<T, true> : grad_kernel<T, false>, rows_of<T>(logits), given);
  });
}

void fused(const Logits& logits, const FusedIn& in, const StatsOut& out) {
  with_dtype(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Plan plan = plan_of_fused(logits.vocab, logits.dtype);
    const auto on_chip = logits.cap != 0 ? fused_on_chip<T, true> : fused_on_chip<T, false>;
    if (!Call{"fused_", logits, plan}.has_place(on_chip))
      plan = streamed_plan(logits.vocab, sizeof(T), kScratch<A>, max_threads_of_long_row(sizeof(T)));
    const Call call{"fused_", logits, plan};
    const Tokens<A> tokens{in.expert,
                           of<A>(in.advantages),
                           of<A>(in.old_logprobs),
                           of<A>(in.ref_logprobs),
                           of<A>(in.rollout_logprobs),
                           of<A>(in.weights),
                           of<A>(in.target_logits),
                           terms_of<A>(in.terms),
                           A(in.scale)};
    const Found<A> found{of<A>(out.logprob), of<A>(out.max), of<A>(out.log_sum), of<A>(out.entropy)};
    const auto streamed = logits.cap != 0 ? fused_streamed<T, true> : fused_streamed<T, false>;
    if (plan.slots == 0)
      call.launch(streamed, rows_of<T>(logits), tokens, found);
    else
      call.launch(on_chip, rows_of<T>(logits), tokens, found, plan);
  });
}

}  // namespace trapo::cuda
