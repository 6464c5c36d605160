// The gradient of the logits, tile by tile, from what was kept of them or from logits computed again.
#pragma once

#include "panels.h"

namespace trapo {

// What a call knows of each token beside its hidden state.
struct Tokens {
  const Tensor &targets, &logprobs, &max, &log_sum;
  const OptionalTensor& entropy;
  const Tensor& g_lp;
  const OptionalTensor& g_entropy;
};

class LogitGradient {
 public:
  // Targets of −1 are not among these rows of the weight.
  LogitGradient(const Head& head, const Kept& kept, const Tokens& tokens);

  // g [rows of panel p, 64], rows `ld` apart, becomes dL/dz of a block of tokens; 0 beyond the last token. z: scratch, a
  // tile, which g may be.
  void tile(int64_t p, const Rows& panel, int64_t block, float* z, float* g, int64_t ld) const;

 private:
  Gradient gradient(int64_t block) const;
  const float* row(int64_t which) const {
    return coefficients_.const_data_ptr<float>() + which * head_.blocks * kBlock;
  }

  const Head& head_;
  const Kept& kept_;
  Tensor targets_;
  bool entropy_;
  Tensor coefficients_;  // [4, blocks · 64]: max, constant, slope, at_target
};

}  // namespace trapo
