// panel_stats: statistics of a chunk of tokens, and what is kept of their logits (panels.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "panels.h"

namespace trapo {
namespace {

constexpr int64_t kMergeBlock = 16;  // panels whose sums are added up before they join the total

State state_at(float* at) { return {at, at + kBlock, at + 2 * kBlock}; }

// States of all panels of a block [panels, 3, 64] -> the tokens' own.
void merge_panels(const float* states, int64_t panels, const State& out) {
  const V floor{float(kFloor)}, zero(0.f), one(1.f);
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const auto part = [&](int64_t p, int64_t which) { return V::loadu(states + (3 * p + which) * kBlock + c); };
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
    max.store(out.max + c), dot.store(out.dot + c);
    (rest + at::vec::maximum(at_max, zero)).store(out.rest + c);
  }
}

struct Statistics {
  const Head& head;
  const Kept& kept;
  const int64_t* targets;
  int64_t references;  // blocks that have some
  float* states;       // [blocks at once][panels][3][64]
  float *max, *rest, *dot, *target;  // [blocks · 64]

  // One panel, the blocks [first, last).
  template <bool kEntropy, class T>
  void panel(int64_t p, const Rows& panel, int64_t first, int64_t last, float* z) const {
    for (int64_t b = first; b < last; ++b) {
      head.logits(p, panel, b, z);
      const State state = state_at(states + ((b - first) * head.panels + p) * 3 * kBlock);
      tile_state<kEntropy>(z, head.rows(p), kept.tile<T>(head, p, b), state);
      if (b < references)
        for (int64_t c = 0; c < kBlock; c += kLanes)
          reference_of<T>(V::loadu(state.max + c)).store(kept.reference(p, head.panels, b) + c);
      each_target(head, targets, p, b, [&](int64_t c, int64_t r) { target[b * kBlock + c] = z[r * kBlock + c]; });
    }
  }

  void merge(int64_t b, int64_t first) const {
    const int64_t at = b * kBlock;
    merge_panels(states + (b - first) * head.panels * 3 * kBlock, head.panels, {max + at, rest + at, dot + at});
  }
};

// -> max, rest, dot, target [C] and, of what is kept in 16 bits, what it is relative to [blocks, panels, 64].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> panel_stats(const Tensor& hidden, const Tensor& weight,
                                                               const OptionalTensor& bias, const Tensor& targets,
                                                               double scale, std::optional<double> cap, bool entropy,
                                                               int64_t products, int64_t at_once,
                                                               OptionalTensor keep_in_weight, OptionalTensor keep) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, bias, scale, cap, products);
  const Tensor y = targets.contiguous();
  check_targets(y, head.tokens, head.vocab);
  Kept kept(head, keep_in_weight, keep, {});
  const auto floats = hidden.options().dtype(at::kFloat);
  const bool relative = kept_type(head) != at::kFloat;
  kept.references = at::empty({relative ? kept.blocks() : 0, head.panels, kBlock}, floats);
  const int64_t chunk = std::min(head.blocks, std::max<int64_t>(1, at_once / kBlock));
  const Tensor states = room<float>(chunk * head.panels * 3 * kBlock);
  const auto vector = [&] { return at::empty({head.blocks * kBlock}, floats); };
  const Tensor max = vector(), rest = vector(), dot = vector(), target = vector();
  const auto data = [](const Tensor& t) { return t.data_ptr<float>(); };
  const Statistics statistics{head,      kept,       y.const_data_ptr<int64_t>(), relative ? kept.blocks() : 0, data(states),
                              data(max), data(rest), data(dot),                   data(target)};
  const ThreadScratch<float> scratch(kTile), operand(head.panel_scratch());
  for (int64_t first = 0; first < head.blocks; first += chunk) {
    const int64_t last = std::min(head.blocks, first + chunk);
    each_item(head.panels, head.products, [&](int64_t p) {
      const Rows panel = head.panel(p, operand.mine());
      with_kept_type(head, [&](auto zero) {
        using T = decltype(zero);
        if (entropy) return statistics.panel<true, T>(p, panel, first, last, scratch.mine());
        statistics.panel<false, T>(p, panel, first, last, scratch.mine());
      });
    });
    each_item(last - first, kFloats, [&](int64_t b) { statistics.merge(first + b, first); });
  }
  for (const Tensor& t : {max, rest, dot, target}) t.resize_({head.tokens});
  return {max, rest, dot, target, kept.references};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trapo_kernels_cpu, m) {
  m.def("advise_huge_pages(Tensor t) -> ()");
  m.def("best_products() -> int", [] { return int64_t(best_products()); });
  m.def("has_products(int products) -> bool", [](int64_t products) { return has_products(Products(products)); });
  m.def(
      "panel_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? cap, bool entropy, "
      "int products, int at_once, Tensor(a!)? keep_in_weight, Tensor(b!)? keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trapo_kernels_cpu, CPU, m) {
  m.impl("advise_huge_pages", advise_huge_pages);
  m.impl("panel_stats", panel_stats);
}

}  // namespace trapo
