// The linear head and its loss on a CPU, panel by panel: a panel is 256 rows of the weight, and its logits lie in tiles
// [256, 64 tokens].
//
//     panel_stats   Z_p = scale · (W_p hᵀ + b_p)  GEMM 1;  RowState of row_math.h per token;  panels merged
//     panel_grad_   G_p = dL/dZ_p                 row_math.h
//                   dW_p (+)= G_p h               GEMM 3, over all tokens: written once
//                   dh += G_gᵀ W_g                GEMM 2, for a group g of panels
//
// Three GEMMs of 2·C·D·V FLOPs. The softmax works on what a GEMM has just left in the L2 cache, and the next GEMM on
// what the softmax has: memory sees each logit once on the way out and once on the way in, against twice and four times
// when a row kernel runs between whole GEMMs. Without gradients it sees none.
//
// Where the logits wait for the gradient: the first tokens' in d_weight itself, where row v holds logits of v until its own
// gradient is written there; the next ones' in a buffer; those of the others are computed again. fp32 heads keep them in
// fp32, others as how far they are below the largest of their panel, in 16 bits (lanes.h); logits themselves are never rounded.
//
// Threads take panels, and tiles of dh; every product and sum has a fixed shape and order. So results are the same to the
// bit for any number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "packing.h"
#include "tiles.h"

namespace trapo {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPanel = 256;  // rows of the weight in a panel
constexpr int64_t kTile = kPanel * kBlock;
constexpr int64_t kDeep = 896;  // words along the sum in one product of GEMM 1

// f(item) for every item; a thread takes the next one when it is free. Which thread does an item makes no difference to
// its result, and a thread that loses its core for a while holds up nobody.
template <class F>
void each_item(int64_t count, Products products, F f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1)) < count;) f(item);
    fence();
    release_products(products);
  });
}

// As many T for each thread.
template <class T>
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t count) : count_(count), all_(room<T>(count * at::get_num_threads())) {}
  T* mine() const { return all_.template data_ptr<T>() + at::get_thread_num() * count_; }

 private:
  int64_t count_;
  Tensor all_;
};

// The head, and a chunk of tokens.
struct Head {
  Tensor hidden, weight, bias;  // bias in fp32; undefined: none
  double scale;
  std::optional<double> cap;
  Products products;
  int64_t tokens, width, vocab, blocks, panels, width_words;
  Tensor packed;  // hᵀ: [blocks][width_words][64]

  Head(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, double scale, std::optional<double> cap,
       int64_t products);

  int64_t rows(int64_t panel) const { return std::min(kPanel, vocab - panel * kPanel); }
  int64_t columns(int64_t block) const { return std::min(kBlock, tokens - block * kBlock); }
  // Words of scratch that panel() needs.
  int64_t panel_scratch() const { return are_row_words(products, weight) ? 0 : kPanel * width_words; }
  Rows panel(int64_t p, Word* scratch) const {
    return row_words(products, weight, p * kPanel, rows(p), scratch);
  }
  // z [rows, 64] of a panel and a block of tokens. Beyond the last token z is that of a hidden state of zeros.
  void logits(int64_t p, const Rows& panel, int64_t block, float* z) const;
};

// What is kept between the passes: tiles [rows, 64], the first blocks of a panel in its own rows of d_weight, the next
// in a buffer [panels, blocks, 256, 64]. `references` [blocks, panels, 64]: what 16 bits are relative to; of fp32 none.
struct Kept {
  Tensor in_weight, buffer, references;  // undefined: none
  int64_t weight_blocks = 0, buffer_blocks = 0;

  // The blocks that d_weight has room for.
  static int64_t room_in(const Tensor& d_weight, at::ScalarType kept) {
    return d_weight.size(1) * d_weight.element_size() / (kBlock * int64_t(c10::elementSize(kept)));
  }
  Kept(const Head& head, const OptionalTensor& d_weight, const OptionalTensor& buffer, const OptionalTensor& references);
  int64_t blocks() const { return weight_blocks + buffer_blocks; }
  template <class T>
  T* tile(const Head& head, int64_t panel, int64_t block) const {
    const int64_t rows = head.rows(panel);
    if (block < weight_blocks) {
      char* at = static_cast<char*>(in_weight.data_ptr());
      return reinterpret_cast<T*>(at + panel * kPanel * in_weight.stride(0) * in_weight.element_size()) + block * rows * kBlock;
    }
    if (block < blocks()) return static_cast<T*>(buffer.data_ptr()) + (panel * buffer.size(1) + block - weight_blocks) * kTile;
    return nullptr;
  }
  float* reference(int64_t panel, int64_t panels, int64_t block) const {
    return references.data_ptr<float>() + (block * panels + panel) * kBlock;
  }
};

at::ScalarType kept_type(const Head& head);

// run(a number of the type that is kept), for the head's operands.
template <class F>
void with_kept_type(const Head& head, F run) {
  if (kept_type(head) == at::kFloat) return run(float(0));
  return run(Fixed{});
}

// run(has entropy, the soft-cap)
template <class F>
void with_options(bool entropy, std::optional<double> cap, F run) {
  const auto with_cap = [&](auto has_entropy) {
    if (cap) return run(has_entropy, SoftCap<float, true>(*cap));
    return run(has_entropy, SoftCap<float, false>(1));
  };
  return entropy ? with_cap(std::true_type{}) : with_cap(std::false_type{});
}

// int64 [C] in [lowest, V).
void check_targets(const Tensor& targets, int64_t tokens, int64_t vocab, int64_t lowest = 0);

// f(token of the block, row of the panel) for the tokens of a block whose target is in the panel.
template <class F>
void each_target(const Head& head, const int64_t* targets, int64_t panel, int64_t block, F f) {
  const int64_t from = panel * kPanel, rows = head.rows(panel), columns = head.columns(block);
  for (int64_t c = 0; c < columns; ++c)
    if (const int64_t r = targets[block * kBlock + c] - from; r >= 0 && r < rows) f(c, r);
}

}  // namespace trapo
