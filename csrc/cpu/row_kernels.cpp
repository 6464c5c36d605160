// Row kernels for CPUs: statistics and in-place gradient of rows of logits x [C, V], fp32, fp64, bf16 or fp16.
//
//     row_stats    m = max z, Σ e^(z−m) without one column at m, Σ e^(z−m)(z−m), z_y
//     row_grad_    x_j becomes e^(d_j) (slope · d_j + constant), the target its own value (row_math.h)
//     row_fused_   both, with the slopes of the built-in terms between them
//
// One thread works on a row, so results do not depend on the number of threads. A row (0.6 MB at V = 152,064 in fp32)
// stays in the L2 cache between its passes: memory is read once and, for a gradient, written once. FLOPs per logit: one
// exp and about 4 more for statistics, the same again for a gradient; a tanh each with a soft-cap.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../built_for.h"
#include "vectors.h"

namespace trapo {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Columns whose terms are added up before they join the sum of the row, so that 150,000 terms lose no digits.
constexpr int64_t kBlock = 2048;

template <class T, bool kEntropy, bool kCap>
struct Row {
  using Column = T;
  using A = Acc<T>;
  using V = Vec<A>;
  SoftCap<A, kCap> cap;

  RowState<A> state(const T* x, int64_t vocab) const {
    V top(-std::numeric_limits<A>::infinity());
    each_vector<false>(x, vocab, [&](V v, int64_t count) {
      if (count < V::size()) v = V::set(top, v, count);
      return top = at::vec::maximum(top, v);
    });
    // The soft-cap is monotone, so the maximum is taken before it.
    const A max = cap.logit(largest_lane<A>(top));
    const V shift(shift_of(max)), floor{A(kFloor)}, zero(A(0)), one(A(1));
    V rest(A(0)), dot(A(0)), at_max(A(0));
    for (int64_t start = 0; start < vocab; start += kBlock) {
      V block_rest(A(0)), block_dot(A(0));
      each_vector<false>(x + start, std::min(kBlock, vocab - start), [&](V v, int64_t count) {
        V d = cap.logit(v) - shift;
        if (count < V::size()) d = V::set(V(-std::numeric_limits<A>::infinity()), d, count);
        const V e = d.exp(), top = d == zero;
        block_rest = block_rest + V::blendv(e, zero, top);
        at_max = at_max + V::blendv(zero, one, top);
        if constexpr (kEntropy) block_dot = at::vec::fmadd(e, at::vec::maximum(d, floor), block_dot);
        return v;
      });
      rest = rest + block_rest;
      dot = dot + block_dot;
    }
    return {max, sum_of_lanes<A>(rest) + ties<A>(int(sum_of_lanes<A>(at_max))), sum_of_lanes<A>(dot)};
  }

  void grad(T* x, int64_t vocab, int64_t target, A max, const RowGradient<A>& g) const {
    const A at_target = g.at_target * cap.slope(A(x[target]));
    const V shift(max), constant(g.constant), slope(g.slope), floor{A(kFloor)}, one(A(1));
    each_vector<true>(x, vocab, [&](V v, int64_t) {
      V tangent, d;
      if constexpr (kCap) {
        tangent = cap.tangent(v);
        d = V(cap.cap) * tangent - shift;
      } else {
        d = v - shift;
      }
      const V e = d.exp();
      V dz = e * constant;
      if constexpr (kEntropy) dz = e * at::vec::fmadd(slope, at::vec::maximum(d, floor), constant);
      if constexpr (kCap) dz = dz * (one - tangent * tangent);
      return dz;
    });
    x[target] = at_target;
  }

  A logit(T x) const { return cap.logit(A(x)); }
};

// run(Row of the dtype and options) for logits of any float dtype.
template <class F>
void with_row(const Tensor& logits, bool entropy, std::optional<double> cap, F run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "trapo_row", [&] {
    using A = Acc<scalar_t>;
    if (entropy && cap) return run(Row<scalar_t, true, true>{SoftCap<A, true>(*cap)});
    if (entropy) return run(Row<scalar_t, true, false>{SoftCap<A, false>(1)});
    if (cap) return run(Row<scalar_t, false, true>{SoftCap<A, true>(*cap)});
    return run(Row<scalar_t, false, false>{SoftCap<A, false>(1)});
  });
}

void check(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && logits.stride(1) == 1,
              "trapo_kernels: logits must be [C, V] with contiguous rows; got ", logits.sizes());
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.size(0) == logits.size(0),
              "trapo_kernels: targets must be int64 [C] with C=", logits.size(0), "; got ", targets.sizes());
}

int64_t checked(int64_t target, int64_t vocab) {
  TORCH_CHECK(target >= 0 && target < vocab, "trapo_kernels: targets must be in [0, V); got ", target, " with V=", vocab);
  return target;
}

at::ScalarType stats_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> four_vectors(const Tensor& logits) {
  const auto options = logits.options().dtype(stats_type(logits));
  const auto one = [&] { return at::empty({logits.size(0)}, options); };
  return {one(), one(), one(), one()};
}

// A vector [C] of the statistics' dtype, or nullptr for one that is not given.
template <class A>
const A* values(const Tensor& t, Tensor& keep) {
  keep = t.to(c10::CppTypeToScalarType<A>::value).contiguous();
  return keep.const_data_ptr<A>();
}
template <class A>
const A* values(const OptionalTensor& t, Tensor& keep) {
  return t ? values<A>(*t, keep) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& targets,
                                                     std::optional<double> cap, bool entropy) {
  check(logits, targets);
  auto out = four_vectors(logits);
  const auto y = targets.contiguous();
  const int64_t vocab = logits.size(1), stride = logits.stride(0);
  with_row(logits, entropy, cap, [&](const auto& row) {
    using R = std::decay_t<decltype(row)>;
    using A = typename R::A;
    using T = typename R::Column;
    const T* x = logits.const_data_ptr<T>();
    const int64_t* target = y.const_data_ptr<int64_t>();
    A* max = std::get<0>(out).data_ptr<A>();
    A* rest = std::get<1>(out).data_ptr<A>();
    A* dot = std::get<2>(out).data_ptr<A>();
    A* at_target = std::get<3>(out).data_ptr<A>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* mine = x + i * stride;
        const auto state = row.state(mine, vocab);
        max[i] = state.max, rest[i] = state.rest, dot[i] = state.dot;
        at_target[i] = row.logit(mine[checked(target[i], vocab)]);
      }
    });
  });
  return out;
}

void row_grad_(Tensor logits, const Tensor& targets, const Tensor& logprobs, const Tensor& max, const Tensor& log_sum,
               const OptionalTensor& entropy, const Tensor& g_lp, const OptionalTensor& g_entropy,
               std::optional<double> cap) {
  check(logits, targets);
  const auto y = targets.contiguous();
  const int64_t vocab = logits.size(1), stride = logits.stride(0);
  with_row(logits, g_entropy.has_value(), cap, [&](const auto& row) {
    using R = std::decay_t<decltype(row)>;
    using A = typename R::A;
    using T = typename R::Column;
    Tensor keep[6];
    const A *lp = values<A>(logprobs, keep[0]), *m = values<A>(max, keep[1]), *ls = values<A>(log_sum, keep[2]);
    const A *h = values<A>(entropy, keep[3]), *g = values<A>(g_lp, keep[4]), *gh = values<A>(g_entropy, keep[5]);
    TORCH_CHECK(h != nullptr || gh == nullptr, "trapo_kernels: entropy must be given with g_entropy; got None");
    T* x = logits.data_ptr<T>();
    const int64_t* target = y.const_data_ptr<int64_t>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowStats<A> stats{lp[i], m[i], ls[i], h ? h[i] : A(0)};
        const auto gradient = gradient_of(stats, Slopes<A>{g[i], gh ? gh[i] : A(0)}, gh != nullptr);
        row.grad(x + i * stride, vocab, checked(target[i], vocab), stats.max, gradient);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_fused_(Tensor logits, const Tensor& targets, const Tensor& expert,
                                                      const OptionalTensor& advantages,
                                                      const OptionalTensor& old_logprobs,
                                                      const OptionalTensor& ref_logprobs,
                                                      const OptionalTensor& rollout_logprobs,
                                                      const OptionalTensor& weights, const OptionalTensor& target_logits,
                                                      int64_t expert_term, int64_t policy_term, at::ArrayRef<double> numbers, double scale,
                                                      std::optional<double> cap) {
  check(logits, targets);
  TORCH_CHECK(numbers.size() == 9, "trapo_kernels: numbers must be the 9 of FusedTerms; got ", numbers.size());
  auto out = four_vectors(logits);
  const auto y = targets.contiguous(), is_expert = expert.contiguous();
  const int64_t vocab = logits.size(1), stride = logits.stride(0);
  with_row(logits, true, cap, [&](const auto& row) {
    using R = std::decay_t<decltype(row)>;
    using A = typename R::A;
    using T = typename R::Column;
    Terms<A> terms{int(expert_term), int(policy_term)};
    A* fields[] = {&terms.expert_coef, &terms.alpha,        &terms.luffy_gamma, &terms.clip_low, &terms.clip_high,
                   &terms.dual_clip,   &terms.entropy_coef, &terms.kl_coef,     &terms.tis_cap};
    for (size_t i = 0; i < numbers.size(); ++i) *fields[i] = A(numbers[i]);
    Tensor keep[6];
    const A *adv = values<A>(advantages, keep[0]), *old_lp = values<A>(old_logprobs, keep[1]);
    const A *ref = values<A>(ref_logprobs, keep[2]), *rollout = values<A>(rollout_logprobs, keep[3]);
    const A *weight = values<A>(weights, keep[4]), *exact = values<A>(target_logits, keep[5]);
    const bool* e = is_expert.const_data_ptr<bool>();
    const int64_t* target = y.const_data_ptr<int64_t>();
    T* x = logits.data_ptr<T>();
    A* logprob = std::get<0>(out).data_ptr<A>();
    A* max = std::get<1>(out).data_ptr<A>();
    A* log_sum = std::get<2>(out).data_ptr<A>();
    A* entropy = std::get<3>(out).data_ptr<A>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* mine = x + i * stride;
        const int64_t t = checked(target[i], vocab);
        auto state = row.state(mine, vocab);
        A z = row.logit(mine[t]);
        if (exact != nullptr) {
          const A rounded = z;
          z = exact[i], state = with_target(state, rounded, z);
        }
        const auto stats = finish(state, z);
        logprob[i] = stats.logprob, max[i] = stats.max, log_sum[i] = stats.log_sum, entropy[i] = stats.entropy;
        const Token<A> token{e[i],
                             old_lp != nullptr,
                             adv ? adv[i] : A(0),
                             old_lp ? old_lp[i] : A(0),
                             ref ? ref[i] : A(0),
                             rollout ? rollout[i] : A(0),
                             weight ? weight[i] : A(1)};
        auto g = slopes(terms, token, stats);
        g.logprob *= A(scale), g.entropy *= A(scale);
        row.grad(mine, vocab, t, stats.max, gradient_of(stats, g, terms.entropy_coef != 0));
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trapo_kernels_cpu, m) {
  m.def("row_stats(Tensor logits, Tensor targets, float? cap, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_grad_(Tensor(a!) logits, Tensor targets, Tensor logprobs, Tensor max, Tensor log_sum, Tensor? entropy, "
      "Tensor g_lp, Tensor? g_entropy, float? cap) -> ()");
  m.def(
      "row_fused_(Tensor(a!) logits, Tensor targets, Tensor expert, Tensor? advantages, Tensor? old_logprobs, "
      "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? weights, Tensor? target_logits, int expert_term, "
      "int policy_term, float[] numbers, float scale, float? cap) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trapo_kernels_cpu, CPU, m) {
  m.impl("row_stats", row_stats);
  m.impl("row_grad_", row_grad_);
  m.impl("row_fused_", row_fused_);
}

}  // namespace trapo
