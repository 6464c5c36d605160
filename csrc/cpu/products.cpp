// Which product is which, and the one of floats.
#include "products.h"

#include <ATen/native/CPUBlas.h>

#include "lanes.h"
#include "pairs.h"
#include "product_kernel.h"

namespace trapo {

namespace {

struct Floats {
  using V = trapo::V;
  using B = V;
  static constexpr int kLanes = V::size();
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr int kColumns = 2;  // 16 registers
#elif defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
  static constexpr int kColumns = 4;
#else
  static constexpr int kColumns = 1;  // a vector is several registers
#endif
  static V zero() { return V(0.f); }
  static B load(const Word* b) { return V::loadu(b); }
  static V all(const Word* a) { return V(*a); }
  static V add(V sum, B b, V a) { return at::vec::fmadd(a, b, sum); }
  static void put(float* c, V sum, bool add) { (add ? sum + V::loadu(c) : sum).store(c); }
};

}  // namespace

void product(Products products, int64_t m, int64_t k, const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c,
             int64_t ldc, bool add, Ahead ahead) {
  if (products == kFloats) return product_by<Floats>(m, k, a, lda, b, ldb, c, ldc, add, ahead);
  if (products == kPairs) return product_of_pairs(m, k, a, lda, b, ldb, c, ldc, add, ahead);
  at::native::cpublas::brgemm(m, kBlock, 2 * k, 2 * lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

bool has_products(Products products) {
  if (products == kFloats) return true;
  // brgemm would also run, more slowly, where there are no tiles.
  return products == kPairs ? has_pairs() : has_pairs() || at::native::cpublas::could_pack(at::kBFloat16);
}

Products best_products() {
  if (at::native::cpublas::could_pack(at::kBFloat16)) return kTiles;  // exactly: the CPU has AMX
  return has_pairs() ? kPairs : kFloats;
}

void release_products(Products products) {
  if (products == kTiles) at::native::cpublas::brgemm_release();
}

}  // namespace trapo
