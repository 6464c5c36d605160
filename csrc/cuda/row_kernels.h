// What the operators call: the verbs on pointers, without torch. Each launches one kernel on `stream` and returns;
// nothing is allocated and nothing waits, so calls can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "../row_math.h"
#include "plan.h"

namespace trapo::cuda {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBfloat16 };

// Rows [C, V], `stride` elements apart, and what every verb needs of them. A row whose target is outside of [0, V) gives
// NaN: the values are on the device, where nothing can be raised.
struct Logits {
  void* data;
  Dtype dtype;
  int64_t rows, vocab, stride;
  const int64_t* targets;
  double cap;  // of the soft-cap; 0: none
  void* stream;
};

// Vectors [C] are fp32, and fp64 for fp64 logits. Those that may be missing are nullptr.
struct StateOut {
  void *max, *rest, *dot, *target;
};
struct GradIn {
  const void *logprob, *max, *log_sum, *entropy, *g_logprob, *g_entropy;  // both entropies may be missing
};
struct FusedIn {
  const bool* expert;
  // Each may be missing.
  const void *advantages, *old_logprobs, *ref_logprobs, *rollout_logprobs, *weights, *target_logits;
  Terms<double> terms;
  double scale;
};
// hidden [C, D], weight [V, D], bias [V] or nullptr: of fp16 or bf16, strides in elements.
struct TargetsIn {
  const void *hidden, *weight, *bias;
  Dtype dtype;
  int64_t rows, vocab, hidden_stride, weight_stride;
  int width;
  const int64_t* targets;
  double scale;
  void* stream;
};
struct StatsOut {
  void *logprob, *max, *log_sum, *entropy;
};

// Throw std::runtime_error with kernel, shape and plan where the launch fails.
void stats(const Logits& logits, const StateOut& out);
void grad(const Logits& logits, const GradIn& in);
void fused(const Logits& logits, const FusedIn& in, const StatsOut& out);
void target_logits(const TargetsIn& in, float* out);

// The plan of fused_ on the current device.
Plan plan_of_fused(int64_t vocab, Dtype dtype);

}  // namespace trapo::cuda
