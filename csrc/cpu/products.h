// The matrix products of the panel loop: C [m, 64] (+)= A [m, k] B [k, 64], summed in fp32, in a fixed order.
//
// k counts words of 32 bits. A word is a float, or two neighbours along k in bf16; A is stored by rows, B as rows of 64
// words. So the loop around is the same for all of them:
//
//     kFloats   fp32 operands; those of 16 bits are widened, a panel at a time     any CPU
//     kPairs    bf16 operands, vdpbf16ps                                           AVX512-BF16
//     kTiles    the same by oneDNN's brgemm                                        AMX
//
// 6 rows x 64 columns of C stay in registers (AVX2: 6 x 16); B comes from the L2 cache once per 6 rows.
#pragma once

#include <cstdint>

namespace trapo {

enum Products : int64_t { kFloats = 0, kPairs = 1, kTiles = 2 };

using Word = float;  // 32 bits, whatever they mean

constexpr int64_t kBlock = 64;  // columns of B and C

// Memory that the next product reads, fetched into the L2 cache while this one runs.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
};

void product(Products products, int64_t m, int64_t k, const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c,
             int64_t ldc, bool add, Ahead ahead = {});

// Which of them this library and this CPU have; the fastest for bf16.
bool has_products(Products products);
Products best_products();

// The thread's tiles are free again: at the end of every parallel body that used kTiles.
void release_products(Products products);

}  // namespace trapo
