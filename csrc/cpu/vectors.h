// Columns of a row as SIMD vectors of the type that statistics are computed in (fp32; fp64 for fp64).
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "../row_math.h"

namespace trapo {

template <class T>
using Acc = at::opmath_type<T>;
template <class A>
using Vec = at::vec::Vectorized<A>;

// f(vector, number of its lanes that are columns) -> vector for n columns of x, in order. The other lanes of the last
// vector are 0. kStore: the result becomes the columns.
template <bool kStore, class T, class F>
inline void each_vector(T* x, int64_t n, F f) {
  using Native = Vec<std::remove_const_t<T>>;
  constexpr int64_t step = Native::size();
  const auto visit = [&](int64_t at, int64_t count) {
    const Native native = Native::loadu(x + at, count);
    if constexpr (std::is_same_v<std::remove_const_t<T>, Acc<std::remove_const_t<T>>>) {
      const auto out = f(native, count);
      if constexpr (kStore) out.store(x + at, count);
    } else {
      constexpr int64_t half = step / 2;
      auto [low, high] = at::vec::convert_to_float(native);
      low = f(low, count < half ? count : half);
      high = count > half ? f(high, count - half) : high;
      if constexpr (kStore) at::vec::convert_from_float<std::remove_const_t<T>>(low, high).store(x + at, count);
    }
  };
  int64_t at = 0;
  for (; at + step <= n; at += step) visit(at, step);
  if (at < n) visit(at, n - at);
}

// z of x, and dz/dx: the soft-cap z = cap · tanh(x / cap), or none.
template <class A, bool kCap>
struct SoftCap {
  A cap, inverse;

  explicit SoftCap(double cap) : cap(cap), inverse(1 / cap) {}

  template <class X>
  X logit(X x) const {
    if constexpr (!kCap) return x;
    return X(cap) * tangent(x);
  }
  // dz/dx
  A slope(A x) const {
    if constexpr (!kCap) return A(1);
    const A t = tangent(x);
    return A(1) - t * t;
  }
  template <class X>
  X tangent(X x) const {
    if constexpr (std::is_same_v<X, A>) {
      // By the vector function too: a target that is its row's maximum must be equal to it.
      A lanes[Vec<A>::size()];
      tangent(Vec<A>(x)).store(lanes);
      return lanes[0];
    } else {
      return (x * X(inverse)).tanh();
    }
  }
};

template <class A>
inline A largest_lane(Vec<A> v) {
  A lanes[Vec<A>::size()];
  v.store(lanes);
  A out = lanes[0];
  for (int i = 1; i < Vec<A>::size(); ++i) out = max_nan(out, lanes[i]);
  return out;
}

template <class A>
inline A sum_of_lanes(Vec<A> v) {
  A lanes[Vec<A>::size()];
  v.store(lanes);
  for (int width = Vec<A>::size() / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace trapo
