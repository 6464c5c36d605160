// The linear head and its loss on a CPU, fp32, panel by panel: a panel is 256 rows of the weight, and its logits for
// a chunk of C tokens lie as [256, C], so that SIMD lanes are tokens and nothing is reduced across lanes.
//
//     panel_stats   Z_p = scale · (W_p hᵀ + b_p)  GEMM 1;  RowState of row_math.h per token;  panels merged
//     panel_grad_   G_p = dL/dZ_p                 row_math.h
//                   dW_p (+)= G_p h               GEMM 3
//                   dh += G_gᵀ W_g                GEMM 2, for a group g of panels
//
// Three GEMMs of 2·C·D·V FLOPs. The softmax works on what a GEMM has just left in the L2 cache, and the next GEMM on
// what the softmax has: memory sees each logit once on the way out and once on the way in, against twice and four times
// when a row kernel runs between whole GEMMs. Without gradients it sees none.
//
// Where the logits wait for the gradient: in a buffer [V, C], or, for the first C ≤ D tokens, in d_weight itself: row
// v of d_weight holds the logits of v until its own gradient is written there. Without either they are computed again.
//
// Threads take panels, and tiles of dh; every product and sum has a fixed shape and order, and the GEMM library is told
// that there is one thread. So results are the same to the bit for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

// Of MKL, where torch was built with it. Gives back what was set before; 0: nothing.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace trapo {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using V = Vec<float>;

constexpr int64_t kPanel = 256;          // rows of the weight in a panel
constexpr int64_t kGroup = 8 * kPanel;   // and in a group, whose gradients wait for GEMM 2
constexpr int64_t kTokenTile = 512;      // of dh, at most
constexpr int64_t kWidthTile = 448;
constexpr int64_t kMergeBlock = 16;      // panels whose sums are added up before they join the total

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A length cut into pieces that are about equal, and at most `most` long; multiples of a vector.
int64_t even_pieces(int64_t length, int64_t most) {
  return ceil_div(ceil_div(length, ceil_div(length, most)), V::size()) * V::size();
}

// As long as this lives, MKL takes its sequential way on this thread. In a parallel region of torch it has one thread in
// any case, but cuts a long sum by the number of threads that it believes it may use.
class SequentialMkl {
 public:
  SequentialMkl() : before_(set(1)) {}
  ~SequentialMkl() { set(before_); }
  SequentialMkl(const SequentialMkl&) = delete;
  SequentialMkl& operator=(const SequentialMkl&) = delete;

 private:
  static int set(int threads) { return MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(threads) : 0; }
  int before_;
};

// f(item) for every item, spread over threads, each of which runs its GEMMs alone.
template <class F>
void each_item(int64_t count, F f) {
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const SequentialMkl sequential;
    for (int64_t item = begin; item < std::min(end, count); ++item) f(item);
  });
}

// f(first row, end) for the panels of the weight rows [0, size).
template <class F>
void each_panel(int64_t size, F f) {
  each_item(ceil_div(size, kPanel), [&](int64_t p) { f(p * kPanel, std::min(size, (p + 1) * kPanel)); });
}

// One panel's logits [rows, columns], a row every `stride` floats; a column is a token.
struct Panel {
  float* z;
  int64_t stride, rows, columns;
};

// f(first column, lanes) over columns, a vector at a time.
template <class F>
void each_lanes(int64_t columns, F f) {
  for (int64_t c = 0; c < columns; c += V::size()) f(c, std::min<int64_t>(V::size(), columns - c));
}

struct State {
  float *max, *rest, *dot;  // [columns]
};

template <bool kEntropy, bool kCap>
void panel_state(const Panel& p, const SoftCap<float, kCap>& cap, const State& out) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::fill_n(out.max, p.columns, -infinity);
  std::fill_n(out.rest, p.columns, 0.f);
  std::fill_n(out.dot, p.columns, 0.f);
  std::vector<float> at_max(size_t(p.columns), -1.f);  // rows that have it, beside the one that is left out
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* z = p.z + r * p.stride;
    each_lanes(p.columns, [&](int64_t c, int64_t n) {
      at::vec::maximum(V::loadu(out.max + c, n), V::loadu(z + c, n)).store(out.max + c, n);
    });
  }
  // The soft-cap is monotone, so the maximum is taken before it.
  if constexpr (kCap)
    each_lanes(p.columns, [&](int64_t c, int64_t n) {
      cap.logit(V::loadu(out.max + c, n)).store(out.max + c, n);
    });
  const V zero(0.f), one(1.f), lowest(-infinity), floor{float(kFloor)};
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* z = p.z + r * p.stride;
    each_lanes(p.columns, [&](int64_t c, int64_t n) {
      const V max = V::loadu(out.max + c, n);
      const V d = cap.logit(V::loadu(z + c, n)) - V::blendv(max, zero, max == lowest);
      const V e = d.exp(), top = d == zero;
      (V::loadu(out.rest + c, n) + V::blendv(e, zero, top)).store(out.rest + c, n);
      (V::loadu(at_max.data() + c, n) + V::blendv(zero, one, top)).store(at_max.data() + c, n);
      if constexpr (kEntropy)
        at::vec::fmadd(e, at::vec::maximum(d, floor), V::loadu(out.dot + c, n)).store(out.dot + c, n);
    });
  }
  each_lanes(p.columns, [&](int64_t c, int64_t n) {
    (V::loadu(out.rest + c, n) + at::vec::maximum(V::loadu(at_max.data() + c, n), zero)).store(out.rest + c, n);
  });
}

// States of all panels [panels, 3, columns] -> the tokens' own.
void merge_panels(const float* states, int64_t panels, int64_t columns, const State& out) {
  const V floor{float(kFloor)}, zero(0.f), one(1.f);
  at::parallel_for(0, ceil_div(columns, V::size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t c = group * V::size(), n = std::min<int64_t>(V::size(), columns - c);
      const auto part = [&](int64_t p, int64_t which) { return V::loadu(states + (3 * p + which) * columns + c, n); };
      V max = part(0, 0), rest(0.f), dot(0.f), at_max(-1.f);
      for (int64_t p = 1; p < panels; ++p) max = at::vec::maximum(max, part(p, 0));
      for (int64_t first = 0; first < panels; first += kMergeBlock) {
        V block_rest(0.f), block_dot(0.f);
        for (int64_t p = first; p < std::min(panels, first + kMergeBlock); ++p) {
          const V by = at::vec::maximum(part(p, 0) - max, floor), factor = by.exp(), top = by == zero, others = part(p, 1);
          block_rest = at::vec::fmadd(others + V::blendv(one, zero, top), factor, block_rest);
          block_dot = at::vec::fmadd(at::vec::fmadd(by, others + one, part(p, 2)), factor, block_dot);
          at_max = at_max + V::blendv(zero, one, top);
        }
        rest = rest + block_rest;
        dot = dot + block_dot;
      }
      max.store(out.max + c, n);
      (rest + at::vec::maximum(at_max, zero)).store(out.rest + c, n);
      dot.store(out.dot + c, n);
    }
  });
}

// What a token's gradient is made of [columns]: RowGradient of row_math.h, spread over vectors.
struct Gradient {
  const float *max, *constant, *slope, *at_target;
};

template <bool kEntropy, bool kCap>
void panel_gradient(const Panel& p, const SoftCap<float, kCap>& cap, const Gradient& k, float* out) {
  const V floor{float(kFloor)}, one(1.f);
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* z = p.z + r * p.stride;
    float* g = out + r * p.columns;
    each_lanes(p.columns, [&](int64_t c, int64_t n) {
      V x = V::loadu(z + c, n), tangent;
      if constexpr (kCap) tangent = cap.tangent(x), x = V(cap.cap) * tangent;
      const V d = x - V::loadu(k.max + c, n), e = d.exp();
      V dz = V::loadu(k.constant + c, n);
      if constexpr (kEntropy) dz = at::vec::fmadd(V::loadu(k.slope + c, n), at::vec::maximum(d, floor), dz);
      dz = dz * e;
      if constexpr (kCap) dz = dz * (one - tangent * tangent);
      dz.store(g + c, n);
    });
  }
}

template <class F>
void with_options(bool entropy, std::optional<double> cap, F run) {
  const auto with_cap = [&](auto has_entropy) {
    if (cap) return run(has_entropy, SoftCap<float, true>(*cap));
    return run(has_entropy, SoftCap<float, false>(1));
  };
  return entropy ? with_cap(std::true_type{}) : with_cap(std::false_type{});
}

// The head: logits of weight rows [from, to) for a chunk of tokens.
struct Head {
  Tensor hidden, weight;
  OptionalTensor bias;
  double scale;

  Head(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, double scale)
      : hidden(hidden), weight(weight), bias(bias), scale(scale) {
    TORCH_CHECK(hidden.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
                "trapo_kernels: hidden and weight must be float32; got ", hidden.scalar_type());
    TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                "trapo_kernels: hidden must be [C, D] and weight [V, D]; got ", hidden.sizes(), " and ", weight.sizes());
  }

  int64_t vocab() const { return weight.size(0); }
  int64_t tokens() const { return hidden.size(0); }

  // Inside a parallel region, where the GEMM library uses one thread. `out`: [to − from, C], a row any number of floats.
  void logits(int64_t from, int64_t to, Tensor out) const {
    const Tensor rows = weight.narrow(0, from, to - from);
    if (bias) {
      const Tensor start = bias->narrow(0, from, to - from).unsqueeze(1);
      at::addmm_out(out, start, rows, hidden.t(), scale, scale);
    } else {
      at::addmm_out(out, out, rows, hidden.t(), 0, scale);
    }
  }
};

Panel panel_of(const Tensor& z) { return {z.data_ptr<float>(), z.stride(0), z.size(0), z.size(1)}; }

void check_targets(const Tensor& targets, int64_t tokens, int64_t vocab, int64_t lowest = 0) {
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.size(0) == tokens,
              "trapo_kernels: targets must be int64 [C] with C=", tokens, "; got ", targets.sizes());
  const int64_t* y = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK(y[i] >= lowest && y[i] < vocab, "trapo_kernels: targets must be in [0, V); got ", y[i], " with V=", vocab);
}

// f(token, row of the panel) for the tokens whose target is in [from, to).
template <class F>
void each_target(const int64_t* targets, int64_t tokens, int64_t from, int64_t to, F f) {
  for (int64_t c = 0; c < tokens; ++c)
    if (targets[c] >= from && targets[c] < to) f(c, targets[c] - from);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> panel_stats(const Tensor& hidden, const Tensor& weight,
                                                       const OptionalTensor& bias, const Tensor& targets, double scale,
                                                       std::optional<double> cap, bool entropy, OptionalTensor keep) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, bias, scale);
  const int64_t tokens = head.tokens(), vocab = head.vocab(), panels = ceil_div(vocab, kPanel);
  const Tensor y = targets.contiguous();
  check_targets(y, tokens, vocab);
  const Tensor states = at::empty({panels, 3, tokens}, hidden.options());
  const auto one = [&] { return at::empty({tokens}, hidden.options()); };
  const Tensor max = one(), rest = one(), dot = one(), target = one();
  with_options(entropy, cap, [&](auto has_entropy, const auto& soft) {
    each_panel(vocab, [&](int64_t from, int64_t to) {
      const Tensor rows = keep ? keep->narrow(0, from, to - from) : at::empty({to - from, tokens}, hidden.options());
      const Tensor z = rows.narrow(1, 0, tokens);
      head.logits(from, to, z);
      const Panel panel = panel_of(z);
      float* mine = states.data_ptr<float>() + 3 * (from / kPanel) * tokens;
      panel_state<decltype(has_entropy)::value>(panel, soft, State{mine, mine + tokens, mine + 2 * tokens});
      each_target(y.const_data_ptr<int64_t>(), tokens, from, to, [&](int64_t c, int64_t r) {
        target.data_ptr<float>()[c] = soft.logit(panel.z[r * panel.stride + c]);
      });
    });
  });
  merge_panels(states.const_data_ptr<float>(), panels, tokens,
               State{max.data_ptr<float>(), rest.data_ptr<float>(), dot.data_ptr<float>()});
  return {max, rest, dot, target};
}

// The gradient's coefficients [4, C]: max, constant, slope, at_target.
Tensor coefficients(const Tensor& logprobs, const Tensor& max, const Tensor& log_sum, const OptionalTensor& entropy,
                    const Tensor& g_lp, const OptionalTensor& g_entropy) {
  const int64_t tokens = logprobs.size(0);
  const auto read = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const Tensor out = at::empty({4, tokens}, logprobs.options());
  const Tensor lp = read(logprobs), m = read(max), ls = read(log_sum), g = read(g_lp);
  const Tensor h = read(entropy.value_or(lp)), gh = read(g_entropy.value_or(lp));
  float* k = out.data_ptr<float>();
  for (int64_t c = 0; c < tokens; ++c) {
    const auto at = [c](const Tensor& t) { return t.const_data_ptr<float>()[c]; };
    const RowStats<float> stats{at(lp), at(m), at(ls), at(h)};
    const auto row = gradient_of(stats, Slopes<float>{at(g), at(gh)}, g_entropy.has_value());
    k[c] = stats.max, k[tokens + c] = row.constant, k[2 * tokens + c] = row.slope, k[3 * tokens + c] = row.at_target;
  }
  return out;
}

float sum_of(const float* values, int64_t n) {
  V sum(0.f);
  each_lanes(n, [&](int64_t c, int64_t count) { sum = sum + V::loadu(values + c, count); });
  return sum_of_lanes<float>(sum);
}

// dh (+)= G_gᵀ W_g, tile by tile.
void add_to_d_hidden(const Tensor& d_hidden, const Tensor& g, const Tensor& weight, bool first) {
  const int64_t tokens = d_hidden.size(0), width = d_hidden.size(1);
  const int64_t tall = even_pieces(tokens, kTokenTile), wide = even_pieces(width, kWidthTile);
  const int64_t across = ceil_div(width, wide);
  each_item(ceil_div(tokens, tall) * across, [&](int64_t tile) {
    const int64_t c = tile / across * tall, d = tile % across * wide;
    const int64_t height = std::min(tall, tokens - c), length = std::min(wide, width - d);
    Tensor out = d_hidden.narrow(0, c, height).narrow(1, d, length);
    at::addmm_out(out, out, g.narrow(1, c, height).t(), weight.narrow(1, d, length), first ? 0 : 1);
  });
}

// Everything that a panel's gradient needs, and what becomes of it.
struct Pass {
  const Head& head;
  Tensor targets;       // [C] int64; −1: not among these rows of the weight
  Tensor coefficients;  // [4, C]
  OptionalTensor logits;
  OptionalTensor d_weight, d_bias;
  bool accumulate;  // into d_weight

  Gradient gradient() const {
    const float* k = coefficients.const_data_ptr<float>();
    const int64_t n = coefficients.size(1);
    return {k, k + n, k + 2 * n, k + 3 * n};
  }

  Panel panel(int64_t from, int64_t to, const Tensor& scratch) const {
    return panel_of(logits ? logits->narrow(0, from, to - from).narrow(1, 0, head.tokens()) : scratch);
  }

  // g becomes the gradient of the logits of weight rows [from, to).
  template <bool kEntropy, bool kCap>
  void differentiate(int64_t from, int64_t to, const Tensor& g, const SoftCap<float, kCap>& cap) const {
    if (!logits) head.logits(from, to, g);
    const Panel z = panel(from, to, g);
    const Gradient k = gradient();
    float* out = g.data_ptr<float>();
    const int64_t tokens = head.tokens();
    // Taken before the logits are overwritten, where they are in the scratch itself.
    std::vector<std::pair<int64_t, float>> at_targets;
    each_target(targets.const_data_ptr<int64_t>(), tokens, from, to, [&](int64_t c, int64_t r) {
      at_targets.emplace_back(r * tokens + c, k.at_target[c] * cap.slope(z.z[r * z.stride + c]));
    });
    panel_gradient<kEntropy>(z, cap, k, out);
    for (const auto& [at, value] : at_targets) out[at] = value;
  }

  // GEMM 3, and the bias's part.
  void add_to_weight(int64_t from, int64_t to, const Tensor& g) const {
    const int64_t tokens = head.tokens();
    if (d_bias)
      for (int64_t r = 0; r < to - from; ++r)
        d_bias->data_ptr<float>()[from + r] += sum_of(g.const_data_ptr<float>() + r * tokens, tokens);
    if (d_weight) {
      Tensor rows = d_weight->narrow(0, from, to - from);
      at::addmm_out(rows, rows, g, head.hidden, accumulate ? 1 : 0);
    }
  }
};

void panel_grad_(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& targets,
                 double scale, std::optional<double> cap, const Tensor& logprobs, const Tensor& max,
                 const Tensor& log_sum, const OptionalTensor& entropy, const Tensor& g_lp,
                 const OptionalTensor& g_entropy, const OptionalTensor& kept, bool kept_in_d_weight,
                 OptionalTensor d_hidden, OptionalTensor d_weight, OptionalTensor d_bias, bool accumulate_weight,
                 bool accumulate_hidden) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, bias, scale);
  const int64_t tokens = head.tokens(), vocab = head.vocab();
  TORCH_CHECK(!kept_in_d_weight || (d_weight && !accumulate_weight && tokens <= weight.size(1)),
              "trapo_kernels: kept_in_d_weight needs a d_weight that is not accumulated into, and C <= D; got C=", tokens);
  const Pass pass{head,     targets.contiguous(), coefficients(logprobs, max, log_sum, entropy, g_lp, g_entropy),
                  kept_in_d_weight ? d_weight : kept, d_weight, d_bias, accumulate_weight};
  check_targets(pass.targets, tokens, vocab, -1);
  const Tensor scratch = at::empty({std::min(kGroup, vocab), tokens}, hidden.options());
  with_options(g_entropy.has_value(), cap, [&](auto has_entropy, const auto& soft) {
    for (int64_t start = 0; start < vocab; start += kGroup) {
      const int64_t size = std::min(kGroup, vocab - start);
      each_panel(size, [&](int64_t from, int64_t to) {
        const Tensor g = scratch.narrow(0, from, to - from);
        pass.template differentiate<decltype(has_entropy)::value>(start + from, start + to, g, soft);
        pass.add_to_weight(start + from, start + to, g);
      });
      if (d_hidden)
        add_to_d_hidden(*d_hidden, scratch.narrow(0, 0, size), weight.narrow(0, start, size),
                        start == 0 && !accumulate_hidden);
    }
  });
}

// Σ |dL/dz| of each row of the weight [V] and, by panel, of each token [panels, C]: what goes with them if they go.
std::tuple<Tensor, Tensor> panel_mass(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                      std::optional<double> cap, const Tensor& logprobs, const Tensor& max,
                                      const Tensor& log_sum, const OptionalTensor& entropy, const Tensor& g_lp,
                                      const OptionalTensor& g_entropy, const Tensor& kept) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, {}, 1);
  const int64_t tokens = head.tokens(), vocab = head.vocab();
  const Pass pass{head, targets.contiguous(), coefficients(logprobs, max, log_sum, entropy, g_lp, g_entropy), kept};
  check_targets(pass.targets, tokens, vocab, -1);
  const Tensor by_row = at::empty({vocab}, hidden.options());
  const Tensor by_token = at::zeros({ceil_div(vocab, kPanel), tokens}, hidden.options());
  with_options(g_entropy.has_value(), cap, [&](auto has_entropy, const auto& soft) {
    each_panel(vocab, [&](int64_t from, int64_t to) {
      const Tensor g = at::empty({to - from, tokens}, hidden.options());
      pass.template differentiate<decltype(has_entropy)::value>(from, to, g, soft);
      float* of_tokens = by_token.data_ptr<float>() + from / kPanel * tokens;
      for (int64_t r = 0; r < to - from; ++r) {
        const float* values = g.const_data_ptr<float>() + r * tokens;
        V sum(0.f);
        each_lanes(tokens, [&](int64_t c, int64_t n) {
          const V mass = V::loadu(values + c, n).abs();
          sum = sum + mass;
          (V::loadu(of_tokens + c, n) + mass).store(of_tokens + c, n);
        });
        by_row.data_ptr<float>()[from + r] = sum_of_lanes<float>(sum);
      }
    });
  });
  return {by_row, by_token};
}

// Asks for 2 MiB pages under memory that nobody has touched yet: its first touch is then 10% of a small loss cheaper.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + t.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trapo_kernels_cpu, m) {
  m.def("advise_huge_pages(Tensor t) -> ()");
  m.def(
      "panel_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? cap, bool entropy, "
      "Tensor(a!)? keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "panel_grad_(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? cap, "
      "Tensor logprobs, Tensor max, Tensor log_sum, Tensor? entropy, Tensor g_lp, Tensor? g_entropy, Tensor? kept, "
      "bool kept_in_d_weight, Tensor(a!)? d_hidden, Tensor(b!)? d_weight, Tensor(c!)? d_bias, "
      "bool accumulate_weight, bool accumulate_hidden) -> ()");
  m.def(
      "panel_mass(Tensor hidden, Tensor weight, Tensor targets, float? cap, Tensor logprobs, Tensor max, "
      "Tensor log_sum, Tensor? entropy, Tensor g_lp, Tensor? g_entropy, Tensor kept) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trapo_kernels_cpu, CPU, m) {
  m.impl("advise_huge_pages", advise_huge_pages);
  m.impl("panel_stats", panel_stats);
  m.impl("panel_grad_", panel_grad_);
  m.impl("panel_mass", panel_mass);
}

}  // namespace trapo
