// bf16 operands as pairs of neighbours along the sum (pairs.cpp).
#pragma once

#include "products.h"

namespace trapo {

// Whether this library and this CPU have AVX512-BF16.
bool has_pairs();

// k counts pairs.
void product_of_pairs(int64_t m, int64_t k, const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc,
                      bool add, Ahead ahead);

// A tile [rows, 64] of floats as bf16, twice: by rows, `ld` apart, and by pairs of rows [rows / 2, 64, 2]. An odd last
// row is paired with zeros.
void round_tile(const float* tile, int64_t rows, uint16_t* by_rows, int64_t ld, uint16_t* by_pairs);

}  // namespace trapo
