// The softmax on tiles of logits [rows of a panel, 64 tokens]: statistics of the tokens, what is kept, and gradients.
// SIMD lanes are tokens, so that nothing is reduced across lanes.
#pragma once

#include <limits>

#include "lanes.h"
#include "products.h"

namespace trapo {

// Of 64 tokens and the rows so far: RowState of row_math.h, spread over vectors.
struct State {
  float *max, *rest, *dot;
};

// What a token's gradient is made of [64]: RowGradient of row_math.h, spread over vectors.
struct Gradient {
  const float *max, *constant, *slope;
};

// What is kept of a logit between the passes: itself in fp32, or by how much it is below the largest of its panel in
// 16 bits.
template <class Kept>
inline V reference_of(V max) {
  const V zero(0.f);
  return std::is_same_v<Kept, float> ? zero : V::blendv(max, zero, max == V(-std::numeric_limits<float>::infinity()));
}

// x = scale · (product + bias), z = cap · tanh(x / cap), in place.
template <bool kCap>
void finish_logits(float* z, int64_t rows, float scale, const float* bias, const SoftCap<float, kCap>& cap) {
  const V by(scale);
  for (int64_t r = 0; r < rows; ++r) {
    const V shift(bias ? scale * bias[r] : 0.f);
    for (int64_t c = 0; c < kBlock; c += kLanes) {
      float* at = z + r * kBlock + c;
      cap.logit(at::vec::fmadd(V::loadu(at), by, shift)).store(at);
    }
  }
}

// The state of z [rows, 64]; z goes to `keep` too, unless that is null.
template <bool kEntropy, class Kept>
void tile_state(const float* z, int64_t rows, Kept* keep, const State& out) {
  const float infinity = std::numeric_limits<float>::infinity();
  const V zero(0.f), floor{float(kFloor)};
  const bool past = aligned(keep);
  for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
    V max[2] = {V(-infinity), V(-infinity)}, rest[2] = {zero, zero}, dot[2] = {zero, zero}, ties[2] = {V(-1.f), V(-1.f)};
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < 2; ++i) max[i] = larger(V::loadu(z + r * kBlock + c + i * kLanes), max[i]);
    V shift[2], below[2];
    for (int i = 0; i < 2; ++i) shift[i] = V::blendv(max[i], zero, max[i] == V(-infinity));
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = z + r * kBlock + c;
      for (int i = 0; i < 2; ++i) {
        const V d = below[i] = V::loadu(x + i * kLanes) - shift[i];
        const V e = exp_of(d);
        add_beside_maximum(d, e, rest[i], ties[i]);
        if constexpr (kEntropy) dot[i] = at::vec::fmadd(e, larger(floor, d), dot[i]);
      }
      if (keep == nullptr) continue;
      if constexpr (std::is_same_v<Kept, float>)
        store_two(keep + r * kBlock + c, V::loadu(x), V::loadu(x + kLanes), past);
      else
        store_two(keep + r * kBlock + c, below[0], below[1], past);
    }
    for (int i = 0; i < 2; ++i) {
      const int64_t at = c + i * kLanes;
      max[i].store(out.max + at), dot[i].store(out.dot + at);
      (rest[i] + larger(zero, ties[i])).store(out.rest + at);
    }
  }
}

// dL/dz of `kept` [rows, 64] -> g, rows `ld` apart; they may be the same. `reference` [64]: what kept logits are relative to.
template <bool kEntropy, bool kCap, class Kept>
void tile_gradient(const Kept* kept, int64_t rows, const float* reference, const Gradient& k,
                   const SoftCap<float, kCap>& cap, float* g, int64_t ld) {
  constexpr int64_t kRowsAhead = 32;
  const V floor{float(kFloor)}, one(1.f);
  for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
    V shift[2], constant[2], slope[2], base[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t at = c + i * kLanes;
      base[i] = V::loadu(reference + at), shift[i] = V::loadu(k.max + at) - base[i];
      constant[i] = V::loadu(k.constant + at), slope[i] = V::loadu(k.slope + at);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Kept* from = kept + r * kBlock + c;
      fetch(from + kRowsAhead * kBlock);
      const auto [low, high] = load_two(from);
      const V x[2] = {low, high};
      for (int i = 0; i < 2; ++i) {
        const V d = x[i] - shift[i], e = exp_of(d);
        V dz = constant[i];
        if constexpr (kEntropy) dz = at::vec::fmadd(slope[i], larger(floor, d), dz);
        dz = dz * e;
        if constexpr (kCap) {
          const V tangent = larger(V(-1.f), (x[i] + base[i]) * V(cap.inverse));
          dz = dz * (one - tangent * tangent);
        }
        dz.store(g + r * ld + c + i * kLanes);
      }
    }
  }
}

}  // namespace trapo
