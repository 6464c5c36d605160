// The register kernel of products.h, for any vector type: 6 x kColumns vectors of C, and fewer rows at the end.
#pragma once

#include <algorithm>

#include "products.h"

namespace trapo {

// Op: V, kLanes, kColumns (vectors beside each other); load(B), all(word of A), add(sum, B, A), and of C load, store, sum.
template <class Op, int kRows>
inline __attribute__((always_inline)) void rows_of_product(int64_t k, const Word* a, int64_t lda, const Word* b,
                                                           int64_t ldb, float* c, int64_t ldc, bool add, Ahead& ahead) {
  constexpr int kColumns = Op::kColumns;
  constexpr int64_t kStep = 16;
  typename Op::V sums[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) sums[r][j] = Op::zero();
  for (int64_t start = 0; start < k; start += kStep) {
    if (ahead.at < ahead.end) {
      __builtin_prefetch(ahead.at, 0, 2), __builtin_prefetch(ahead.at + 64, 0, 2);
      ahead.at += 128;
    }
    if (start / kStep < kRows)
      for (int j = 0; j < kColumns * Op::kLanes; j += 16) __builtin_prefetch(c + start / kStep * ldc + j, 1, 3);
    const int64_t stop = std::min(k, start + kStep);
    for (int64_t i = start; i < stop; ++i, ++a, b += ldb) {
      typename Op::B x[kColumns];
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) x[j] = Op::load(b + j * Op::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto y = Op::all(a + r * lda);
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j) sums[r][j] = Op::add(sums[r][j], x[j], y);
      }
    }
  }
  // C is added last: a sum of pieces is more exact than one long sum.
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) Op::put(c + r * ldc + j * Op::kLanes, sums[r][j], add);
}

template <class Op>
inline void product_by(int64_t m, int64_t k, const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc,
                       bool add, Ahead ahead) {
  constexpr int64_t wide = Op::kColumns * Op::kLanes;
  for (int64_t j = 0; j < kBlock; j += wide) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6)
      rows_of_product<Op, 6>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add, ahead);
    if (i + 4 <= m) {
      rows_of_product<Op, 4>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add, ahead);
      i += 4;
    }
    for (; i < m; ++i) rows_of_product<Op, 1>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add, ahead);
  }
}

}  // namespace trapo
