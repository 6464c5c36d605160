// bf16 for CPUs with AVX512-BF16: the product of pairs, and the rounding of a tile of gradients. Compiled for such a CPU
// whatever the rest of the library is compiled for; has_pairs() says whether it may be called.
#include "pairs.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#endif

// Here, so that the kernel is compiled for that target too.
#include "product_kernel.h"

namespace trapo {
namespace {

struct Pairs {
  using V = __m512;
  using B = __m512bh;
  static constexpr int kLanes = 16, kColumns = 4;
  static inline __attribute__((always_inline)) V zero() { return _mm512_setzero_ps(); }
  static inline __attribute__((always_inline)) B load(const Word* b) { return (B)_mm512_loadu_ps(b); }
  static inline __attribute__((always_inline)) B all(const Word* a) { return (B)_mm512_set1_ps(*a); }
  static inline __attribute__((always_inline)) V add(V sum, B b, B a) { return _mm512_dpbf16_ps(sum, b, a); }
  static inline __attribute__((always_inline)) void put(float* c, V sum, bool add) {
    _mm512_storeu_ps(c, add ? _mm512_add_ps(sum, _mm512_loadu_ps(c)) : sum);
  }
};

// 64 floats, rounded to two vectors of bf16.
inline __attribute__((always_inline)) void round_row(const float* from, __m512i* out) {
  for (int i = 0; i < 2; ++i)
    out[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 32 * i + 16), _mm512_loadu_ps(from + 32 * i));
}

}  // namespace

void product_of_pairs(int64_t m, int64_t k, const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc,
                      bool add, Ahead ahead) {
  product_by<Pairs>(m, k, a, lda, b, ldb, c, ldc, add, ahead);
}

void round_tile(const float* tile, int64_t rows, uint16_t* by_rows, int64_t ld, uint16_t* by_pairs) {
  alignas(64) uint16_t order[2][32];  // of the two rows' words: token 0 of both, token 1 of both, ...
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i) order[half][i] = uint16_t(16 * half + i / 2 + (i % 2 ? 32 : 0));
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  for (int64_t r = 0; r < rows; r += 2) {
    __m512i a[2], b[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    round_row(tile + r * kBlock, a);
    if (r + 1 < rows) round_row(tile + (r + 1) * kBlock, b);
    for (int i = 0; i < 2; ++i) {
      _mm512_storeu_si512(by_rows + r * ld + 32 * i, a[i]);
      if (r + 1 < rows) _mm512_storeu_si512(by_rows + (r + 1) * ld + 32 * i, b[i]);
      uint16_t* to = by_pairs + r * kBlock + 64 * i;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a[i], first, b[i]));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a[i], second, b[i]));
    }
  }
}

bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace trapo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else  // another CPU, or a library for less than AVX-512

#include <cstdlib>

namespace trapo {

void product_of_pairs(int64_t, int64_t, const Word*, int64_t, const Word*, int64_t, float*, int64_t, bool, Ahead) {
  std::abort();  // has_pairs() is asked before
}
void round_tile(const float*, int64_t, uint16_t*, int64_t, uint16_t*) { std::abort(); }
bool has_pairs() { return false; }

}  // namespace trapo

#endif
