#include "slopes.h"

#include <ATen/ops/empty.h>

namespace trapo {
namespace {

// [4, blocks · 64]: max, constant, slope and at_target of each token; beyond the last one such that the gradient is 0.
Tensor coefficients(const Head& head, const Tokens& t) {
  const auto read = [](const Tensor& values) { return values.to(at::kFloat).contiguous(); };
  const Tensor out = at::empty({4, head.blocks * kBlock}, head.hidden.options().dtype(at::kFloat));
  const Tensor lp = read(t.logprobs), m = read(t.max), ls = read(t.log_sum), g = read(t.g_lp);
  const Tensor h = read(t.entropy.value_or(lp)), gh = read(t.g_entropy.value_or(lp));
  const auto row = [&](int64_t which) { return out.data_ptr<float>() + which * head.blocks * kBlock; };
  float *max = row(0), *constant = row(1), *slope = row(2), *at_target = row(3);
  std::fill(max, max + 4 * head.blocks * kBlock, 0.f);
  std::fill(max, constant, std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < head.tokens; ++c) {
    const auto at = [c](const Tensor& values) { return values.const_data_ptr<float>()[c]; };
    const RowStats<float> stats{at(lp), at(m), at(ls), at(h)};
    const auto found = gradient_of(stats, Slopes<float>{at(g), at(gh)}, t.g_entropy.has_value());
    max[c] = stats.max, constant[c] = found.constant, slope[c] = found.slope, at_target[c] = found.at_target;
    if (head.cap) {
      const float tangent = (stats.logprob + (stats.max + stats.log_sum)) / float(*head.cap);
      at_target[c] *= 1 - tangent * tangent;
    }
  }
  return out;
}

}  // namespace

LogitGradient::LogitGradient(const Head& head, const Kept& kept, const Tokens& tokens)
    : head_(head), kept_(kept), targets_(tokens.targets.contiguous()), entropy_(tokens.g_entropy.has_value()) {
  TORCH_CHECK(tokens.entropy || !tokens.g_entropy, "trapo_kernels: entropy must be given with g_entropy; got None");
  check_targets(targets_, head.tokens, head.vocab, -1);
  for (const Tensor& t : {tokens.logprobs, tokens.max, tokens.log_sum, tokens.g_lp})
    TORCH_CHECK(t.dim() == 1 && t.size(0) == head.tokens, "trapo_kernels: statistics and slopes must be [C]; got ", t.sizes());
  coefficients_ = coefficients(head, tokens);
}

Gradient LogitGradient::gradient(int64_t block) const {
  const int64_t at = block * kBlock;
  return {row(0) + at, row(1) + at, row(2) + at};
}

void LogitGradient::tile(int64_t p, const Rows& panel, int64_t block, float* z, float* g, int64_t ld) const {
  static const float zeros[kBlock] = {};
  const int64_t rows = head_.rows(p), columns = head_.columns(block);
  const Gradient k = gradient(block);
  if (block >= kept_.blocks()) head_.logits(p, panel, block, z);
  with_options(entropy_, head_.cap, [&](auto has_entropy, const auto& soft) {
    constexpr bool kEntropy = decltype(has_entropy)::value;
    if (block >= kept_.blocks()) return tile_gradient<kEntropy>(z, rows, zeros, k, soft, g, ld);
    with_kept_type(head_, [&](auto zero) {
      using T = decltype(zero);
      const float* reference = std::is_same_v<T, float> ? zeros : kept_.reference(p, head_.panels, block);
      tile_gradient<kEntropy>(kept_.tile<T>(head_, p, block), rows, reference, k, soft, g, ld);
    });
  });
  const float* at_target = row(3) + block * kBlock;
  each_target(head_, targets_.const_data_ptr<int64_t>(), p, block,
              [&](int64_t c, int64_t r) { g[r * ld + c] = at_target[c]; });
  if (columns < kBlock)
    for (int64_t r = 0; r < rows; ++r) std::fill_n(g + r * ld + columns, kBlock - columns, 0.f);
}

}  // namespace trapo
