#include "packing.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace trapo {
namespace {

// run(a number of t's type)
template <class F>
void with_type(const at::Tensor& t, F run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "trapo_panels", [&] { run(scalar_t(0)); });
}

template <class T>
void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const auto [low, high] = load_two(from + i);
      low.store(to + i), high.store(to + i + kLanes);
    }
  for (; i < n; ++i) to[i] = float(from[i]);
}

// Rows a and b of 16 bits, word after word.
void interleave(const uint16_t* a, const uint16_t* b, uint32_t* to, int64_t n) {
  if (b)
    for (int64_t i = 0; i < n; ++i) to[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
  else
    for (int64_t i = 0; i < n; ++i) to[i] = a[i];
}

template <class T>
const T* row_of(const at::Tensor& t, int64_t row) {
  return t.const_data_ptr<T>() + row * t.stride(0);
}

template <class T>
void store_rows(const float* tile, T* to, int64_t ld, int64_t rows, int64_t columns, bool add) {
  const bool whole = columns == kBlock, past = whole && aligned(to) && ld * int64_t(sizeof(T)) % 64 == 0;
  for (int64_t r = 0; r < rows; ++r, tile += kBlock, to += ld) {
    if (!whole) {
      for (int64_t c = 0; c < columns; ++c) to[c] = T(tile[c] + (add ? float(to[c]) : 0.f));
      continue;
    }
    for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
      V low = V::loadu(tile + c), high = V::loadu(tile + c + kLanes);
      if (add) {
        fetch(to + ld + c);
        const auto [l, h] = load_two(to + c);
        low = low + l, high = high + h;
      }
      store_two(to + c, low, high, past);
    }
  }
}

}  // namespace

bool are_row_words(Products products, const at::Tensor& t) {
  if (products == kFloats) return t.scalar_type() == at::kFloat;
  return t.size(1) % 2 == 0 && t.stride(0) % 2 == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0;
}

Rows row_words(Products products, const at::Tensor& t, int64_t from, int64_t count, Word* scratch) {
  const int64_t width = t.size(1), ld = words(products, width);
  if (are_row_words(products, t)) {
    const char* at = static_cast<const char*>(t.const_data_ptr()) + from * t.stride(0) * t.element_size();
    return {reinterpret_cast<const Word*>(at), t.stride(0) / (products == kFloats ? 1 : 2)};
  }
  for (int64_t r = 0; r < count; ++r) {
    Word* to = scratch + r * ld;
    if (products == kFloats) {
      with_type(t, [&](auto zero) { widen(row_of<decltype(zero)>(t, from + r), to, width); });
    } else {
      to[ld - 1] = 0;
      std::memcpy(to, row_of<at::BFloat16>(t, from + r), size_t(width) * sizeof(at::BFloat16));
    }
  }
  return {scratch, ld};
}

void column_words(Products products, const at::Tensor& t, int64_t from, int64_t count, int64_t first, int64_t columns,
                  Word* to, int64_t ld) {
  if (products == kFloats) {
    with_type(t, [&](auto zero) {
      for (int64_t r = 0; r < count; ++r) widen(row_of<decltype(zero)>(t, from + r) + first, to + r * ld, columns);
    });
    return;
  }
  const auto row = [&](int64_t r) {
    return r < count ? reinterpret_cast<const uint16_t*>(row_of<at::BFloat16>(t, from + r) + first) : nullptr;
  };
  for (int64_t r = 0; r < count; r += 2)
    interleave(row(r), row(r + 1), reinterpret_cast<uint32_t*>(to + r / 2 * ld), columns);
}

void transpose_words(const Word* from, int64_t ld, int64_t rows, int64_t columns, Word* to, int64_t ld_to) {
  constexpr int64_t side = 16;
  for (int64_t r = 0; r < rows; r += side)
    for (int64_t c = 0; c < columns; c += side) {
      const Word* in = from + r * ld + c;
      Word* out = to + c * ld_to + r;
      if (rows - r >= side && columns - c >= side) {
        at::vec::transpose_mxn<float, side, side>(in, ld, out, ld_to);
        continue;
      }
      for (int64_t i = 0; i < std::min(side, rows - r); ++i)
        for (int64_t k = 0; k < std::min(side, columns - c); ++k) out[k * ld_to + i] = in[i * ld + k];
    }
}

void store_tile(const float* tile, const at::Tensor& t, int64_t from, int64_t rows, int64_t first, int64_t columns,
                bool add) {
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>)
      store_rows(tile, t.data_ptr<T>() + from * t.stride(0) + first, t.stride(0), rows, columns, add);
  });
}

template <class T>
at::Tensor room(int64_t count) {
  const at::Tensor out = at::empty({count}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  advise_huge_pages(out);
  return out;
}
template at::Tensor room<float>(int64_t);
template at::Tensor room<at::BFloat16>(int64_t);

// Asks for 2 MiB pages under memory that nobody has touched yet: its first touch is then 10% of a small loss cheaper.
void advise_huge_pages(const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + t.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace trapo
