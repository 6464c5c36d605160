// What a row of logits is reduced to, and what the loss of its token does to it: scalar math for host and device.
//
// z are a row's logits, y its target, m = max z, S = Σ e^(z−m) = 1 + R, H the entropy, logp = z_y − m − log S.
//
//     RowState     m, R and Σ e^(z−m)(z−m) of some columns; states of disjoint columns merge
//     with_target  the state of a row of 16-bit logits whose z_y is known in fp32
//     RowStats     logp, m, log S, H of the whole row
//     slopes       ∂loss/∂logp and ∂loss/∂H of the token: objective.py has the formulas, tests hold the two together
//     RowGradient  dL/dz_j = g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H), as e^(d_j) (slope · d_j + constant), d = z − m
//
// R leaves out one column that has the maximum: beside its e^0 = 1 the others would lose their digits where they have
// little. log S = log1p(R) then holds them all, and with it logp and 1 − π_y of a target that leads by any margin.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define TRAPO_HD __host__ __device__ __forceinline__
#else
#define TRAPO_HD inline
#endif

namespace trapo {

// e^-1e4 is 0 in double too, so raising z − m to this changes nothing but 0 · −inf, which becomes 0.
constexpr double kFloor = -1e4;
// e^80 is a number in fp32.
constexpr double kFurthest = 80;

// The larger one, NaN if either is.
template <class T>
TRAPO_HD T max_nan(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {  // one instruction
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(float(a)), "f"(float(b)));
    return out;
  }
#endif
  return (a > b || a != a) ? a : b;
}

template <class T>
TRAPO_HD T raise(T value, T floor) {
  return value < floor ? floor : value;
}

template <class T>
struct RowState {
  T max = -std::numeric_limits<T>::infinity();  // −inf: no column, or none that is possible
  T rest = 0;
  T dot = 0;  // 0 where entropy is not asked for
};

template <class T>
TRAPO_HD bool none(T max) {
  return max == -std::numeric_limits<T>::infinity();
}

// What logits are shifted by before the exponential: m, but 0 where every logit so far is −inf.
template <class T>
TRAPO_HD T shift_of(T max) {
  return none(max) ? T(0) : max;
}

// What a state's columns are to a row of this maximum: d grows by m − max for each. Where they have the maximum, one
// is still left out; of several such states but one may do so.
template <class T>
TRAPO_HD RowState<T> shifted(const RowState<T>& state, T max) {
  if (state.max == max || none(state.max)) return {max, state.rest, state.dot};
  const T by = state.max - max, factor = std::exp(by), all = 1 + state.rest;
  return {max, all * factor, factor == T(0) ? T(0) : factor * (state.dot + by * all)};
}

// What is added to the rest when this many states of one maximum have been added up.
template <class T>
TRAPO_HD T ties(int holders) {
  return holders > 1 ? T(holders - 1) : T(0);
}

template <class T>
TRAPO_HD RowState<T> merge(const RowState<T>& a, const RowState<T>& b) {
  const T max = max_nan(a.max, b.max);
  const RowState<T> x = shifted(a, max), y = shifted(b, max);
  const bool tie = a.max == b.max && !none(max);
  return {max, x.rest + y.rest + ties<T>(1 + tie), x.dot + y.dot};
}

// The state where z_y is `target` and not the rounded logit that was read. Where the target is the column that is left
// out, the others are all that there is in `rest`, and keep their digits; elsewhere its share in the sums is exchanged.
// `target` becomes what is to be taken for it: rounding may have moved a huge logit further than an exponential reaches.
template <class T>
TRAPO_HD RowState<T> with_target(const RowState<T>& state, T rounded, T& target) {
  const T own = std::exp(rounded - state.max);
  if (rounded >= state.max || state.rest < own / 2) {
    target = raise(target, state.max - T(kFurthest));
    const T by = state.max - target, factor = std::exp(by);
    return {target, factor * state.rest, factor * (state.dot + by * state.rest)};
  }
  const T before = raise(rounded - state.max, T(kFloor)), now = raise(target - state.max, T(kFloor)), e = std::exp(now);
  return {state.max, raise(state.rest - own, T(0)) + e, state.dot - own * before + e * now};
}

template <class T>
struct RowStats {
  T logprob, max, log_sum, entropy;
};

template <class T>
TRAPO_HD RowStats<T> finish(const RowState<T>& state, T target) {
  const T rest = state.rest + (state.max - state.max);  // NaN where the maximum is no number
  const T log_sum = std::log1p(rest);
  return {(target - state.max) - log_sum, state.max, log_sum, raise(log_sum - state.dot / (1 + rest), T(0))};
}

// backends/base.py's FusedTerms, and the numbers of `Term.fused` in objective.py.
enum ExpertTerm : int { kNoExpert = 0, kSft = 1, kTrsft = 2, kDft = 3, kLuffy = 4 };
enum PolicyTerm : int { kNoPolicy = 0, kClip = 1 };

template <class T>
struct Terms {
  int expert, policy;
  T expert_coef, alpha, luffy_gamma, clip_low, clip_high, dual_clip, entropy_coef, kl_coef, tis_cap;
};

template <class T>
struct Token {
  bool expert, has_old;
  T advantage, old_logprob, ref_logprob, rollout_logprob;  // 0 where not given
  T weight = 1;  // of its loss
};

template <class T>
struct Slopes {
  T logprob, entropy;
};

template <class T>
TRAPO_HD T expert_slope(const Terms<T>& o, const Token<T>& t, T p) {
  if (o.expert == kSft) return T(-1);
  if (o.expert == kTrsft) return p > o.alpha ? T(-1) : -p / o.alpha;
  if (o.expert == kDft) return -p;
  if (o.expert == kLuffy) return -t.advantage * o.luffy_gamma * p / ((p + o.luffy_gamma) * (p + o.luffy_gamma));
  return T(0);
}

template <class T>
TRAPO_HD T policy_slope(const Terms<T>& o, const Token<T>& t, T logp) {
  if (o.policy == kNoPolicy) return T(0);
  const T old_logp = t.has_old ? t.old_logprob : logp;
  // A token of probability zero has ratio 0, whatever the old probability.
  const T ratio = logp == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(logp - old_logp);
  // A ratio may be infinite where the advantage is 0.
  const bool clipped = t.advantage == 0 || (t.advantage < 0 && (ratio < o.clip_low || ratio > o.dual_clip)) ||
                       (t.advantage > 0 && ratio > o.clip_high);
  T slope = clipped ? T(0) : -ratio * t.advantage;
  if (o.tis_cap > 0) {
    // 0 where the old probability is, whatever the sampler's.
    const bool never = old_logp == -std::numeric_limits<T>::infinity();
    const T weight = never ? T(0) : std::exp(old_logp - t.rollout_logprob);
    slope *= weight > o.tis_cap ? o.tis_cap : weight;
  }
  return slope;
}

template <class T>
TRAPO_HD Slopes<T> slopes(const Terms<T>& o, const Token<T>& t, const RowStats<T>& row) {
  // A row that does not count may hold anything.
  if (t.weight == 0) return {T(0), T(0)};
  Slopes<T> out{T(0), -o.entropy_coef};
  if (t.expert) {
    if (o.expert != kNoExpert) out.logprob = o.expert_coef * expert_slope(o, t, std::exp(row.logprob));
  } else {
    out.logprob = policy_slope(o, t, row.logprob);
    // The difference is 0 where both are −inf.
    const T above = t.ref_logprob == row.logprob ? T(0) : t.ref_logprob - row.logprob;
    if (o.kl_coef != 0) out.logprob -= o.kl_coef * std::expm1(above);
  }
  out.logprob *= t.weight, out.entropy *= t.weight;
  return out;
}

template <class T>
struct RowGradient {
  T constant, slope;  // of e^(d_j)
  T at_target;        // dL/dz_y, without the cancellation of 1 − π_y
  bool with_entropy;
};

template <class T>
TRAPO_HD RowGradient<T> gradient_of(const RowStats<T>& row, const Slopes<T>& g, bool with_entropy) {
  const T inverse_sum = std::exp(-row.log_sum);
  RowGradient<T> out{-g.logprob, T(0), -g.logprob * std::expm1(row.logprob), with_entropy};
  if (with_entropy) {
    const T log_p = raise(row.logprob, T(kFloor));
    out.constant -= g.entropy * (row.entropy - row.log_sum);
    out.slope = -g.entropy * inverse_sum;
    out.at_target -= g.entropy * std::exp(log_p) * (log_p + row.entropy);
  }
  out.constant *= inverse_sum;
  return out;
}

}  // namespace trapo
