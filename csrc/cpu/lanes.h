// fp32 vectors beyond what ATen has: a faster e^x, stores past the caches, and 16-bit formats two vectors at a time.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace trapo {

using V = Vec<float>;
constexpr int64_t kLanes = V::size();

// The larger one. A NaN may be lost.
inline V larger(V a, V b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// e^x for x ≤ 0 (a little more does no harm): within 2 ulp, 1 at 0, 0 at −∞ and below −104, NaN at NaN. x = n log 2 + r,
// and e^r by the polynomial of Cephes' expf. A third of the time that at::vec's takes.
inline V exp_of(V x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto polynomial = [](V r) {
    V p = at::vec::fmadd(V(1.9875691500e-4f), r, V(1.3981999507e-3f));
    p = at::vec::fmadd(p, r, V(8.3334519073e-3f));
    p = at::vec::fmadd(p, r, V(4.1665795894e-2f));
    p = at::vec::fmadd(p, r, V(1.6666665459e-1f));
    p = at::vec::fmadd(p, r, V(5.0000001201e-1f));
    return at::vec::fmadd(p, r * r, r + V(1.f));
  };
  const V log2e(1.44269504088896341f), high(-0.693359375f), low(2.12194440e-4f);
#if defined(CPU_CAPABILITY_AVX512)
  const V t = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // a NaN in the second operand stays
  const V n = _mm512_roundscale_ps(t * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(at::vec::fmadd(n, low, at::vec::fmadd(n, high, t))), n);
#else
  const __m256 least = _mm256_set1_ps(-87.3f);  // the result stays a normal number
  const V t = _mm256_max_ps(least, x);
  const V n = _mm256_round_ps(t * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 p = polynomial(at::vec::fmadd(n, low, at::vec::fmadd(n, high, t)));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 out = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  // Zero below, and NaN again where the exponent of one was added to.
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_andnot_ps(_mm256_cmp_ps(x, least, _CMP_LT_OQ), out), x, nan);
#endif
#else
  return x.exp();
#endif
}

// rest += e where d is not 0; ties += 1 where it is.
inline void add_beside_maximum(V d, V e, V& rest, V& ties) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 top = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_EQ_OQ);
  rest = _mm512_mask_add_ps(rest, _mm512_knot(top), rest, e);
  ties = _mm512_mask_add_ps(ties, top, ties, _mm512_set1_ps(1.f));
#else
  const V zero(0.f), top = d == zero;
  rest = rest + V::blendv(e, zero, top);
  ties = ties + V::blendv(zero, V(1.f), top);
#endif
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// A number d in (−88, 0] in 16 bits, within 1/1488: what 16-bit heads keep of a logit, for e^d a relative error of 0.07%,
// less than the rounding of bf16 (fp16 has 0.8% at −20). Below it is −∞, whose e^d is 0 to fp32 too.
struct Fixed {
  uint16_t code;
  static constexpr float kSteps = 744, kStep = 1 / kSteps;
  static constexpr int kNone = 65535;
};

inline void to_fixed(Fixed* to, V low, V high, bool past) {
  const V steps(-Fixed::kSteps);
#if defined(CPU_CAPABILITY_AVX512)
  // What is not below 2^31, or not a number, becomes 2^31.
  const __m256i a = _mm512_cvtusepi32_epi16(_mm512_cvtps_epi32(low * steps));
  const __m256i b = _mm512_cvtusepi32_epi16(_mm512_cvtps_epi32(high * steps));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  _mm512_storeu_si512(to, both);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 most = _mm256_set1_ps(float(Fixed::kNone));
  const __m256i a = _mm256_cvtps_epi32(_mm256_min_ps(low * steps, most));
  const __m256i b = _mm256_cvtps_epi32(_mm256_min_ps(high * steps, most));
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), both);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
#else
  float lanes[2 * kLanes];
  (low * steps).store(lanes), (high * steps).store(lanes + kLanes);
  for (int64_t i = 0; i < 2 * kLanes; ++i)
    to[i].code = lanes[i] < Fixed::kNone ? uint16_t(lanes[i] + 0.5f) : uint16_t(Fixed::kNone);
#endif
}

inline V from_fixed(const Fixed* from) {
  const float infinity = std::numeric_limits<float>::infinity();
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512 d = V(_mm512_cvtepi32_ps(x)) * V(-Fixed::kStep);
  return _mm512_mask_mov_ps(d, _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(Fixed::kNone)), _mm512_set1_ps(-infinity));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256 none = _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_set1_epi32(Fixed::kNone)));
  return _mm256_blendv_ps(V(V(_mm256_cvtepi32_ps(x)) * V(-Fixed::kStep)), _mm256_set1_ps(-infinity), none);
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    lanes[i] = from[i].code == Fixed::kNone ? -infinity : float(from[i].code) * -Fixed::kStep;
  return V::loadu(lanes);
#endif
}

// Two vectors as T, from `to` on. Past the caches where `past` (then `to` is aligned): whole lines that nobody reads soon.
template <class T>
inline void store_two(T* to, V low, V high, bool past) {
  if constexpr (std::is_same_v<T, float>) {
#if defined(CPU_CAPABILITY_AVX512)
    if (past) return _mm512_stream_ps(to, low), _mm512_stream_ps(to + kLanes, high);
#elif defined(CPU_CAPABILITY_AVX2)
    if (past) return _mm256_stream_ps(to, low), _mm256_stream_ps(to + kLanes, high);
#endif
    low.store(to), high.store(to + kLanes);
  } else if constexpr (std::is_same_v<T, Fixed>) {
    to_fixed(to, low, high, past);
  } else {
    const Vec<T> both = at::vec::convert_from_float<T>(low, high);
#if defined(CPU_CAPABILITY_AVX512)
    if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
#elif defined(CPU_CAPABILITY_AVX2)
    if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), both);
#endif
    both.store(to);
  }
}

template <class T>
inline std::tuple<V, V> load_two(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {V::loadu(from), V::loadu(from + kLanes)};
  } else if constexpr (std::is_same_v<T, Fixed>) {
    return {from_fixed(from), from_fixed(from + kLanes)};
  } else {
    return at::vec::convert_to_float(Vec<T>::loadu(from));
  }
}

// Stores past the caches are done before another thread reads them.
inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace trapo
