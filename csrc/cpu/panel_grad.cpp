// panel_grad_: d_hidden, d_weight and d_bias of a chunk of tokens (panels.h).
//
//     for groups of panels:
//       for chunks of the tokens:
//         for panels of the group, in parallel:
//           G_p                  the softmax, tile by tile; in bf16 by rows (A of GEMM 3) and by pairs of rows (B of GEMM 2)
//           W_pᵀ                 once, while it is in the L2 cache (A of GEMM 2)
//           dW_p (+)= G_p h      GEMM 3, in a tile of fp32 that is written once
//         for tiles of dh, in parallel:
//           dhᵀ += W_gᵀ G_g      GEMM 2, in fp32, [blocks][D][64]
//
// Scratch, in bytes, of C tokens at once and T threads: G 4·group·C (bf16: 2·group·C + 512·T·C), hᵀ and h packed, dh 4·N·D.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "pairs.h"
#include "slopes.h"

namespace trapo {
namespace {

constexpr int64_t kTokens = 512;      // along the sum of one product of GEMM 3, however many there are at once
constexpr int64_t kPieceWords = 256;  // along that of GEMM 2
constexpr int64_t kPieceRows = 288;   // rows of W_gᵀ in it
constexpr int64_t kSpan = 8;          // blocks of tokens that meet such a piece while it is in the L2 cache
constexpr int64_t kPad = 16;          // words added to a leading dimension, against rows that share cache sets

struct Outputs {
  OptionalTensor d_hidden, d_weight, d_bias;
  bool accumulate_weight, accumulate_hidden;
};

float sum_of_row(const float* values) {
  V sum(0.f);
  for (int64_t c = 0; c < kBlock; c += kLanes) sum = sum + V::loadu(values + c);
  return sum_of_lanes<float>(sum);
}

class Backward {
 public:
  Backward(const Head& head, const LogitGradient& gradient, const Outputs& out, int64_t at_once, int64_t group);
  void run();

 private:
  // A group of panels, and a chunk of the blocks of tokens.
  struct Part {
    int64_t first_panel, panels, rows, first_block, blocks;
    bool first_chunk, last_chunk, first_group;
  };

  void panel(const Part& part, int64_t item);
  void put_logit_gradient(const Part& part, int64_t item, const Rows& panel);
  void transpose_weight(int64_t p, int64_t item, const Rows& panel);
  void add_to_weight(const Part& part, int64_t item);
  void add_to_hidden(const Part& part, int64_t item);
  void put_d_hidden(int64_t block);
  Tensor pack_hidden() const;

  // G of a panel: where GEMM 3 reads it, by rows; and where GEMM 2 does, [rows in words, 64].
  Word* by_rows(int64_t item) const {
    return products_ == kFloats ? g_.data_ptr<float>() + item * kPanel * ld_g_ : rows_.mine();
  }
  const Word* along_rows(int64_t block, int64_t word) const {
    const Word* g = g_.const_data_ptr<float>();
    return products_ == kFloats ? g + word * ld_g_ + block * kBlock : g + (block * group_words_ + word) * kBlock;
  }

  const Head& head_;
  const LogitGradient& gradient_;
  const Outputs& out_;
  const Products products_;
  const int64_t chunk_, group_, group_words_;  // blocks of tokens at once; rows of the weight
  const int64_t ld_g_, ld_w_, width_blocks_;
  const bool in_chunks_;
  const Tensor g_, w_t_, dh_, sums_, packed_;
  const ThreadScratch<float> rows_, tile_, operand_;
};

Backward::Backward(const Head& head, const LogitGradient& gradient, const Outputs& out, int64_t at_once,
                   int64_t group)
    : head_(head), gradient_(gradient), out_(out), products_(head.products),
      chunk_(std::min(std::max<int64_t>(1, at_once / kBlock), std::max<int64_t>(head.blocks, 1))), 
      group_(kPanel * std::min(std::max<int64_t>(group, 2), std::max<int64_t>(head.panels, 1))),
      group_words_(words(products_, group_)), ld_g_(words(products_, chunk_ * kBlock) + kPad), ld_w_(group_words_ + kPad),
      width_blocks_(ceil_div(head.width, kBlock)), in_chunks_(chunk_ < head.blocks),
      g_(room<float>(products_ == kFloats ? group_ * ld_g_ : chunk_ * group_words_ * kBlock)),
      w_t_(room<float>(out.d_hidden ? head.width * ld_w_ : 0)),
      dh_(room<float>(out.d_hidden ? head.blocks * head.width * kBlock : 0)),
      sums_(room<float>(in_chunks_ && out.d_weight ? group_ * width_blocks_ * kBlock : 0)),
      packed_(out.d_weight ? pack_hidden() : Tensor()), rows_(products_ == kFloats ? 0 : kPanel * ld_g_),
      tile_(std::max(kTile, 16 * head.width)), operand_(head.panel_scratch()) {}

// h: [D/64][tokens in words][64], zeros beyond the edges.
Tensor Backward::pack_hidden() const {
  const int64_t count = words(products_, head_.blocks * kBlock);
  Tensor out = room<float>(width_blocks_ * count * kBlock);
  at::parallel_for(0, width_blocks_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Word* to = out.data_ptr<float>() + j * count * kBlock;
      const int64_t columns = std::min(kBlock, head_.width - j * kBlock);
      const int64_t filled = words(products_, head_.tokens);
      std::fill(columns < kBlock ? to : to + filled * kBlock, to + count * kBlock, 0.f);
      column_words(products_, head_.hidden, 0, head_.tokens, j * kBlock, columns, to, kBlock);
    }
  });
  return out;
}

void Backward::run() {
  for (int64_t p = 0; p < head_.panels; p += group_ / kPanel)
    for (int64_t b = 0; b < head_.blocks; b += chunk_) {
      const int64_t panels = std::min(group_ / kPanel, head_.panels - p), blocks = std::min(chunk_, head_.blocks - b);
      const int64_t rows = std::min(group_, head_.vocab - p * kPanel);
      const Part part{p, panels, rows, b, blocks, b == 0, b + blocks == head_.blocks, p == 0};
      each_item(panels, products_, [&](int64_t item) { panel(part, item); });
      if (!out_.d_hidden) continue;
      const int64_t pieces = ceil_div(head_.width, kPieceRows) * ceil_div(blocks, kSpan);
      each_item(pieces, products_, [&](int64_t item) { add_to_hidden(part, item); });
    }
  if (out_.d_hidden) each_item(head_.blocks, kFloats, [&](int64_t b) { put_d_hidden(b); });
}

void Backward::panel(const Part& part, int64_t item) {
  const int64_t p = part.first_panel + item;
  const Rows rows = head_.panel(p, operand_.mine());
  put_logit_gradient(part, item, rows);
  if (out_.d_hidden && part.first_chunk) transpose_weight(p, item, rows);
  if (out_.d_weight) add_to_weight(part, item);
}

void Backward::put_logit_gradient(const Part& part, int64_t item, const Rows& panel) {
  const int64_t p = part.first_panel + item, rows = head_.rows(p);
  float* tile = tile_.mine();
  for (int64_t b = 0; b < part.blocks; ++b) {
    float* g = products_ == kFloats ? by_rows(item) + b * kBlock : tile;
    const int64_t ld = products_ == kFloats ? ld_g_ : kBlock;
    gradient_.tile(p, panel, part.first_block + b, tile, g, ld);
    if (out_.d_bias)
      for (int64_t r = 0; r < rows; ++r) out_.d_bias->data_ptr<float>()[p * kPanel + r] += sum_of_row(g + r * ld);
    if (products_ != kFloats)
      round_tile(g, rows, reinterpret_cast<uint16_t*>(by_rows(item)) + b * kBlock, 2 * ld_g_,
                 reinterpret_cast<uint16_t*>(const_cast<Word*>(along_rows(b, item * kPanel / 2))));
  }
}

void Backward::transpose_weight(int64_t p, int64_t item, const Rows& panel) {
  Word* to = w_t_.data_ptr<float>() + words(products_, item * kPanel);
  if (products_ == kFloats) return transpose_words(panel.at, panel.ld, head_.rows(p), head_.width, to, ld_w_);
  // 16 pairs of rows at a time.
  float* pairs = tile_.mine();
  for (int64_t r = 0; r < head_.rows(p); r += 32) {
    const int64_t count = std::min<int64_t>(32, head_.rows(p) - r);
    column_words(products_, head_.weight, p * kPanel + r, count, 0, head_.width, pairs, head_.width);
    transpose_words(pairs, head_.width, words(products_, count), head_.width, to + r / 2, ld_w_);
  }
}

void Backward::add_to_weight(const Part& part, int64_t item) {
  const int64_t p = part.first_panel + item, rows = head_.rows(p), all = words(products_, head_.blocks * kBlock);
  const int64_t from = words(products_, part.first_block * kBlock), count = words(products_, part.blocks * kBlock);
  for (int64_t j = 0; j < width_blocks_; ++j) {
    float* sum = in_chunks_ ? sums_.data_ptr<float>() + (item * width_blocks_ + j) * kTile : tile_.mine();
    const Word* h = packed_.const_data_ptr<float>() + (j * all + from) * kBlock;
    const char* next = reinterpret_cast<const char*>(h + all * kBlock);
    for (int64_t k = 0, step = words(products_, kTokens); k < count; k += step) {
      const int64_t size = std::min(step, count - k);
      Ahead ahead;
      if (j + 1 < width_blocks_) ahead = {next + k * kBlock * 4, next + (k + size) * kBlock * 4};
      product(products_, rows, size, by_rows(item) + k, ld_g_, h + k * kBlock, kBlock, sum, kBlock,
              !part.first_chunk || k != 0, ahead);
    }
    if (part.last_chunk)
      store_tile(sum, *out_.d_weight, p * kPanel, rows, j * kBlock, std::min(kBlock, head_.width - j * kBlock),
                 out_.accumulate_weight);
  }
}

void Backward::add_to_hidden(const Part& part, int64_t item) {
  const int64_t spans = ceil_div(part.blocks, kSpan), depth = words(products_, part.rows);
  const int64_t i = item / spans * kPieceRows, tall = std::min(kPieceRows, head_.width - i);
  const int64_t first = item % spans * kSpan, last = std::min(part.blocks, first + kSpan);
  for (int64_t k = 0; k < depth; k += kPieceWords)
    for (int64_t b = first; b < last; ++b)
      product(products_, tall, std::min(kPieceWords, depth - k), w_t_.const_data_ptr<float>() + i * ld_w_ + k, ld_w_,
              along_rows(b, k), products_ == kFloats ? ld_g_ : kBlock,
              dh_.data_ptr<float>() + ((part.first_block + b) * head_.width + i) * kBlock, kBlock,
              !(part.first_group && k == 0));
}

void Backward::put_d_hidden(int64_t block) {
  const float* from = dh_.const_data_ptr<float>() + block * head_.width * kBlock;
  for (int64_t d = 0; d < head_.width; d += kBlock) {
    const int64_t columns = std::min(kBlock, head_.width - d);
    float* tile = tile_.mine();
    transpose_words(from + d * kBlock, kBlock, columns, kBlock, tile, kBlock);
    store_tile(tile, *out_.d_hidden, block * kBlock, head_.columns(block), d, columns, out_.accumulate_hidden);
  }
}

void panel_grad_(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& targets,
                 double scale, std::optional<double> cap, const Tensor& logprobs, const Tensor& max,
                 const Tensor& log_sum, const OptionalTensor& entropy, const Tensor& g_lp,
                 const OptionalTensor& g_entropy, int64_t products, int64_t at_once, int64_t group,
                 bool kept_in_d_weight, const OptionalTensor& kept, const OptionalTensor& references, OptionalTensor d_hidden,
                 OptionalTensor d_weight, OptionalTensor d_bias, bool accumulate_weight, bool accumulate_hidden) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, bias, scale, cap, products);
  TORCH_CHECK(!kept_in_d_weight || (d_weight && !accumulate_weight),
              "trapo_kernels: kept_in_d_weight must be False without a d_weight that is not accumulated into; got True");
  for (const OptionalTensor& out : {d_hidden, d_weight})
    TORCH_CHECK(!out || (out->dim() == 2 && out->stride(1) == 1 && out->size(1) == head.width),
                "trapo_kernels: d_hidden and d_weight must be [C, D] and [V, D], rows contiguous; got ", out->sizes());
  const Kept waiting(head, kept_in_d_weight ? d_weight : OptionalTensor(), kept, references);
  const LogitGradient gradient(head, waiting, {targets, logprobs, max, log_sum, entropy, g_lp, g_entropy});
  const Outputs out{d_hidden, d_weight, d_bias, accumulate_weight, accumulate_hidden};
  Backward(head, gradient, out, at_once, group).run();
}

// Σ |dL/dz| of each row of the weight [V] and, by panel, of each token [panels, C]: what goes with them if they go.
std::tuple<Tensor, Tensor> panel_mass(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& targets, double scale, std::optional<double> cap,
                                      const Tensor& logprobs, const Tensor& max, const Tensor& log_sum,
                                      const OptionalTensor& entropy, const Tensor& g_lp, const OptionalTensor& g_entropy,
                                      int64_t products, const OptionalTensor& kept, const OptionalTensor& references) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Head head(hidden, weight, bias, scale, cap, products);
  const Kept waiting(head, {}, kept, references);
  const LogitGradient gradient(head, waiting, {targets, logprobs, max, log_sum, entropy, g_lp, g_entropy});
  const auto floats = hidden.options().dtype(at::kFloat);
  const Tensor by_row = at::zeros({head.vocab}, floats), by_token = at::zeros({head.panels, head.blocks * kBlock}, floats);
  const ThreadScratch<float> tile(kTile), operand(head.panel_scratch());
  each_item(head.panels, head.products, [&](int64_t p) {
    const Rows panel = head.panel(p, operand.mine());
    float* g = tile.mine();
    for (int64_t b = 0; b < head.blocks; ++b) {
      gradient.tile(p, panel, b, g, g, kBlock);
      float* of_tokens = by_token.data_ptr<float>() + (p * head.blocks + b) * kBlock;
      for (int64_t r = 0; r < head.rows(p); ++r) {
        V sum(0.f);
        for (int64_t c = 0; c < kBlock; c += kLanes) {
          const V mass = V::loadu(g + r * kBlock + c).abs();
          sum = sum + mass;
          (V::loadu(of_tokens + c) + mass).store(of_tokens + c);
        }
        by_row.data_ptr<float>()[p * kPanel + r] += sum_of_lanes<float>(sum);
      }
    }
  });
  return {by_row, by_token.narrow(1, 0, head.tokens).contiguous()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trapo_kernels_cpu, m) {
  m.def(
      "panel_grad_(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? cap, "
      "Tensor logprobs, Tensor max, Tensor log_sum, Tensor? entropy, Tensor g_lp, Tensor? g_entropy, int products, "
      "int at_once, int group, bool kept_in_d_weight, Tensor? kept, Tensor? references, Tensor(a!)? d_hidden, "
      "Tensor(b!)? d_weight, Tensor(c!)? d_bias, bool accumulate_weight, bool accumulate_hidden) -> ()");
  m.def(
      "panel_mass(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? cap, Tensor logprobs, "
      "Tensor max, Tensor log_sum, Tensor? entropy, Tensor g_lp, Tensor? g_entropy, int products, Tensor? kept, "
      "Tensor? references) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trapo_kernels_cpu, CPU, m) {
  m.impl("panel_grad_", panel_grad_);
  m.impl("panel_mass", panel_mass);
}

}  // namespace trapo
