// Operands of products.h: rows of fp32, bf16 or fp16 matrices as words, turned as a product wants them.
#pragma once

#include <ATen/core/Tensor.h>

#include "products.h"

namespace trapo {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words that n numbers along the sum take.
inline int64_t words(Products products, int64_t n) { return products == kFloats ? n : ceil_div(n, 2); }

struct Rows {
  const Word* at;
  int64_t ld;  // words from one row to the next
};

// Rows [from, from + count) of t as words along the columns: where they lie, or a copy in `scratch` [count, words]. What
// fills the last word up is 0.
Rows row_words(Products products, const at::Tensor& t, int64_t from, int64_t count, Word* scratch);
bool are_row_words(Products products, const at::Tensor& t);

// The columns [first, first + columns) of those rows as words along the rows: to [words(count), ld].
void column_words(Products products, const at::Tensor& t, int64_t from, int64_t count, int64_t first, int64_t columns,
                  Word* to, int64_t ld);

// from [rows, columns] -> to [columns, rows]
void transpose_words(const Word* from, int64_t ld, int64_t rows, int64_t columns, Word* to, int64_t ld_to);

// A tile of fp32 [rows, 64] into rows [from, from + rows), columns [first, first + columns) of t; added there where `add`.
void store_tile(const float* tile, const at::Tensor& t, int64_t from, int64_t rows, int64_t first, int64_t columns,
                bool add);

// Room for so many T, at 64 bytes, on 2 MiB pages where it is large.
template <class T>
at::Tensor room(int64_t count);

void advise_huge_pages(const at::Tensor& t);

}  // namespace trapo
