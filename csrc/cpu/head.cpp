// The head of panels.h: its checks, its operands, and the logits of a tile.
#include "panels.h"

namespace trapo {
namespace {

// hᵀ: [blocks][width in words][64], zeros beyond the last token.
Tensor pack_tokens(const Head& head) {
  const int64_t ld = head.width_words;
  Tensor out = room<float>(head.blocks * ld * kBlock);
  const ThreadScratch<float> scratch(are_row_words(head.products, head.hidden) ? 0 : kBlock * ld);
  at::parallel_for(0, head.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Word* to = out.data_ptr<float>() + b * ld * kBlock;
      const int64_t columns = head.columns(b);
      if (columns < kBlock) std::fill_n(to, ld * kBlock, 0.f);
      const Rows rows = row_words(head.products, head.hidden, b * kBlock, columns, scratch.mine());
      transpose_words(rows.at, rows.ld, columns, ld, to, kBlock);
    }
  });
  return out;
}

}  // namespace

Head::Head(const Tensor& h, const Tensor& weight, const OptionalTensor& b, double scale, std::optional<double> cap,
           int64_t which)
    : hidden(h.contiguous()), weight(weight), scale(scale), cap(cap), products(Products(which)) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(hidden.scalar_type() == type && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "trapo_kernels: hidden and weight must be float32, bfloat16 or float16, both; got ", hidden.scalar_type(),
              " and ", type);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.stride(1) == 1,
              "trapo_kernels: hidden must be [C, D] and weight [V, D], rows contiguous; got ", hidden.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(which >= kFloats && which <= kTiles && has_products(products) && (which == kFloats || type == at::kBFloat16),
              "trapo_kernels: products must be one that this CPU has for ", type, "; got ", which);
  TORCH_CHECK(!b || (b->dim() == 1 && b->size(0) == weight.size(0)),
              "trapo_kernels: bias must be None or [V]; got ", b->sizes());
  if (b) bias = b->to(at::kFloat).contiguous();
  tokens = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  blocks = ceil_div(tokens, kBlock), panels = ceil_div(vocab, kPanel), width_words = words(products, width);
  packed = pack_tokens(*this);
}

void Head::logits(int64_t p, const Rows& panel, int64_t block, float* z) const {
  const int64_t count = rows(p), deep = ceil_div(width_words, std::max<int64_t>(ceil_div(width_words, kDeep), 1));
  const Word* b = packed.const_data_ptr<float>() + block * width_words * kBlock;
  const char* next = reinterpret_cast<const char*>(b + width_words * kBlock);
  for (int64_t k = 0; k < width_words; k += deep) {
    const int64_t size = std::min(deep, width_words - k);
    Ahead ahead;
    if (block + 1 < blocks) ahead = {next + k * kBlock * 4, next + (k + size) * kBlock * 4};
    product(products, count, size, panel.at + k, panel.ld, b + k * kBlock, kBlock, z, kBlock, k != 0, ahead);
  }
  if (width_words == 0) std::fill_n(z, count * kBlock, 0.f);
  if (scale == 1 && !bias.defined() && !cap) return;
  const float* shift = bias.defined() ? bias.const_data_ptr<float>() + p * kPanel : nullptr;
  with_options(false, cap, [&](auto, const auto& soft) { finish_logits(z, count, float(scale), shift, soft); });
}

at::ScalarType kept_type(const Head& head) { return head.weight.scalar_type() == at::kFloat ? at::kFloat : at::kShort; }

Kept::Kept(const Head& head, const OptionalTensor& d_weight, const OptionalTensor& given, const OptionalTensor& relative) {
  const auto type = kept_type(head);
  if (d_weight) {
    TORCH_CHECK(d_weight->is_contiguous() && d_weight->sizes() == head.weight.sizes(),
                "trapo_kernels: d_weight must be contiguous [V, D] where logits are kept in it; got ", d_weight->sizes());
    in_weight = *d_weight;
    weight_blocks = std::min(head.blocks, room_in(in_weight, type));
  }
  if (given) {
    TORCH_CHECK(given->is_contiguous() && given->dim() == 4 && given->size(0) == head.panels && given->size(2) == kPanel &&
                    given->size(3) == kBlock && given->scalar_type() == type,
                "trapo_kernels: what is kept must be [panels, blocks, 256, 64] of ", type, "; got ", given->sizes());
    buffer = *given;
    buffer_blocks = std::min(head.blocks - weight_blocks, given->size(1));
  }
  if (relative) references = *relative;
  TORCH_CHECK(!relative || type == at::kFloat || relative->sizes() == at::IntArrayRef({blocks(), head.panels, kBlock}),
              "trapo_kernels: references must be [blocks, panels, 64] of what is kept; got ", relative->sizes());
}

void check_targets(const Tensor& targets, int64_t tokens, int64_t vocab, int64_t lowest) {
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.size(0) == tokens,
              "trapo_kernels: targets must be int64 [C] with C=", tokens, "; got ", targets.sizes());
  const int64_t* y = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK(y[i] >= lowest && y[i] < vocab, "trapo_kernels: targets must be in [0, V); got ", y[i], " with V=", vocab);
}

}  // namespace trapo
