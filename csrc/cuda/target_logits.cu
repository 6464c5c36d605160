// The target's logit of each row of a 16-bit head, scale · (h · W[y] + b[y]), in fp32: the logits are rounded when a GEMM
// writes them, and log p would be off by half a unit of theirs.
//
// A warp has a row: it reads h and one row of W, 16 bytes a lane where both begin at a multiple of that. Memory traffic: 4·D
// bytes a row, beside 6·D·V FLOPs. Sums are in a fixed order.
#include <string>

#include "device.h"
#include "launch.h"
#include "row_kernels.h"

namespace trapo::cuda {
namespace {

template <class T>
struct Operands {
  const T *hidden, *weight, *bias;  // bias: nullptr where there is none
  int64_t hidden_stride, weight_stride;
  const int64_t* targets;
  int64_t vocab;
  int width;
  float scale;
};

template <class T>
__global__ void __launch_bounds__(kWarp) target_kernel(Operands<T> in, float* out) {
  constexpr int kCount = Piece<T>::kCount;
  const int64_t i = blockIdx.x, y = in.targets[i];
  const bool known = y >= 0 && y < in.vocab;
  const T* h = in.hidden + i * in.hidden_stride;
  const T* w = in.weight + (known ? y : 0) * in.weight_stride;
  const bool aligned = (reinterpret_cast<uintptr_t>(h) | reinterpret_cast<uintptr_t>(w)) % kPiece == 0;
  const int pieces = aligned ? in.width / kCount : 0;
  float sum = 0;
  for (int at = threadIdx.x; at < pieces; at += kWarp) {
    const Piece<T> a = reinterpret_cast<const Piece<T>*>(h)[at], b = reinterpret_cast<const Piece<T>*>(w)[at];
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += widen(a.x[k]) * widen(b.x[k]);
  }
  for (int k = pieces * kCount + int(threadIdx.x); k < in.width; k += kWarp) sum += widen(h[k]) * widen(w[k]);
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
  if (threadIdx.x != 0) return;
  if (in.bias != nullptr && known) sum += widen(in.bias[y]);
  out[i] = known ? in.scale * sum : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

void target_logits(const TargetsIn& in, float* out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Logits rows{nullptr, in.dtype, in.rows, in.vocab, 0, in.targets, 0, in.stream};
    const auto of = [](const void* data) { return static_cast<const T*>(data); };
    const Operands<T> operands{of(in.hidden), of(in.weight), of(in.bias), in.hidden_stride, in.weight_stride,
                               in.targets,    in.vocab,      in.width,    float(in.scale)};
    Call{"target_logits", rows, {kWarp, 1, 1, 0, 0}}.launch(target_kernel<T>, operands, out);
  };
  in.dtype == Dtype::kFloat16 ? run(__half{}) : run(__nv_bfloat16{});
}

}  // namespace trapo::cuda
