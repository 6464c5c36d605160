// torch.ops.trapo_kernels_cuda: the row kernels as operators, through torch's stable ABI, so that one build serves several
// versions of torch. backends/cuda.py hands over vectors [C] that are contiguous and of the statistics' dtype.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../built_for.h"
#include "row_kernels.h"

// tests/simt, where the kernels run on CPU tensors, sets another.
#ifndef TRAPO_DISPATCH_KEY
#define TRAPO_DISPATCH_KEY CUDA
#endif

namespace trapo::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// (device index, where to put its current stream)
using StreamOf = AOTITorchError (*)(int32_t, void**);
constexpr const char* kStreamOf = "aoti_torch_get_current_cuda_stream";

// nullptr where there is none. It is in torch's CUDA library, which Python loads without showing its symbols to others;
// linked against, it would keep this library from being loaded, and from saying what it has, under a torch for CPUs.
StreamOf stream_of() {
  static const StreamOf found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library == nullptr ? nullptr : reinterpret_cast<StreamOf>(dlsym(library, kStreamOf));
  }();
  return found;
}

int64_t stream_symbol() { return reinterpret_cast<int64_t>(stream_of()); }

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    default: STD_TORCH_CHECK(false, "trapo_kernels: logits must be float32, float64, float16 or bfloat16");
  }
}

// The tensors' device is the current one as long as this lives; `stream` is the one that torch uses there.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;

  explicit OnDevice(const Tensor& logits) {
    if (!logits.is_cuda()) return;
    STD_TORCH_CHECK(stream_of() != nullptr, "trapo_kernels: this torch has no ", kStreamOf);
    guard.emplace(logits.get_device_index());
    TORCH_ERROR_CODE_CHECK(stream_of()(logits.get_device_index(), &stream));
  }
};

Logits checked(const Tensor& logits, const Tensor& targets, std::optional<double> cap, const OnDevice& on) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && logits.stride(1) == 1,
                  "trapo_kernels: logits must be [C, V] with contiguous rows; got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.is_contiguous() &&
                      targets.size(0) == logits.size(0),
                  "trapo_kernels: targets must be contiguous int64 [C] with C=", logits.size(0));
  return {logits.mutable_data_ptr(), dtype_of(logits), logits.size(0),      logits.size(1),
          logits.stride(0),          targets.const_data_ptr<int64_t>(), cap.value_or(0), on.stream};
}

ScalarType stats_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

FourTensors four_vectors(const Tensor& logits) {
  const auto one = [&] { return torch::stable::new_empty(logits, {logits.size(0)}, stats_type(logits)); };
  return {one(), one(), one(), one()};
}

// The numbers of a vector [C]; nullptr for one that is not given.
const void* values(const Tensor& vector, const Tensor& logits) {
  STD_TORCH_CHECK(vector.scalar_type() == stats_type(logits) && vector.dim() == 1 && vector.is_contiguous() &&
                      vector.size(0) == logits.size(0),
                  "trapo_kernels: vectors must be contiguous [C] of the statistics' dtype with C=", logits.size(0));
  return vector.const_data_ptr();
}
const void* values(const OptionalTensor& vector, const Tensor& logits) {
  return vector ? values(*vector, logits) : nullptr;
}

FourTensors row_stats(Tensor logits, Tensor targets, std::optional<double> cap, bool) {
  const OnDevice on(logits);
  const Logits rows = checked(logits, targets, cap, on);
  FourTensors out = four_vectors(logits);
  auto& [max, rest, dot, target] = out;
  stats(rows, {max.mutable_data_ptr(), rest.mutable_data_ptr(), dot.mutable_data_ptr(), target.mutable_data_ptr()});
  return out;
}

void row_grad_(Tensor logits, Tensor targets, Tensor logprobs, Tensor max, Tensor log_sum, OptionalTensor entropy,
               Tensor g_lp, OptionalTensor g_entropy, std::optional<double> cap) {
  STD_TORCH_CHECK(entropy || !g_entropy, "trapo_kernels: entropy must be given with g_entropy; got None");
  const OnDevice on(logits);
  const Logits rows = checked(logits, targets, cap, on);
  const auto of = [&](const auto& vector) { return values(vector, logits); };
  grad(rows, {of(logprobs), of(max), of(log_sum), of(entropy), of(g_lp), of(g_entropy)});
}

FourTensors row_fused_(Tensor logits, Tensor targets, Tensor expert, OptionalTensor advantages,
                       OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_logprobs,
                       OptionalTensor weights, OptionalTensor target_logits, int64_t expert_term, int64_t policy_term,
                       std::vector<double> numbers, double scale, std::optional<double> cap) {
  STD_TORCH_CHECK(numbers.size() == 9, "trapo_kernels: numbers must be the 9 of FusedTerms; got ", numbers.size());
  STD_TORCH_CHECK(expert.scalar_type() == ScalarType::Bool && expert.is_contiguous() && expert.numel() == logits.size(0),
                  "trapo_kernels: expert must be contiguous bool [C] with C=", logits.size(0));
  const OnDevice on(logits);
  const Logits rows = checked(logits, targets, cap, on);
  FourTensors out = four_vectors(logits);
  auto& [logprob, max, log_sum, entropy] = out;
  const auto of = [&](const auto& vector) { return values(vector, logits); };
  const auto* n = numbers.data();
  const Terms<double> terms{int(expert_term), int(policy_term), n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
  fused(rows,
        {static_cast<const bool*>(expert.const_data_ptr()), of(advantages), of(old_logprobs), of(ref_logprobs),
         of(rollout_logprobs), of(weights), of(target_logits), terms, scale},
        {logprob.mutable_data_ptr(), max.mutable_data_ptr(), log_sum.mutable_data_ptr(), entropy.mutable_data_ptr()});
  return out;
}

Tensor target_logits_(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor targets, double scale) {
  const ScalarType dtype = hidden.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && weight.scalar_type() == dtype &&
                      hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.stride(1) == 1 &&
                      weight.stride(1) == 1 && weight.size(0) >= 1,
                  "trapo_kernels: hidden and weight must be [C, D] and [V, D] of one 16-bit dtype with contiguous rows");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == dtype && bias->is_contiguous() && bias->numel() == weight.size(0)),
                  "trapo_kernels: bias must be contiguous [V] of the dtype of weight with V=", weight.size(0));
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() && targets.numel() == hidden.size(0),
                  "trapo_kernels: targets must be contiguous int64 [C] with C=", hidden.size(0));
  const OnDevice on(hidden);
  Tensor out = torch::stable::new_empty(hidden, {hidden.size(0)}, ScalarType::Float);
  target_logits({hidden.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, dtype_of(hidden),
                 hidden.size(0), weight.size(0), hidden.stride(0), weight.stride(0), int(hidden.size(1)),
                 targets.const_data_ptr<int64_t>(), scale, on.stream},
                out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trapo_kernels_cuda, m) {
  m.def("row_stats(Tensor logits, Tensor targets, float? cap, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_grad_(Tensor(a!) logits, Tensor targets, Tensor logprobs, Tensor max, Tensor log_sum, Tensor? entropy, "
      "Tensor g_lp, Tensor? g_entropy, float? cap) -> ()");
  m.def(
      "row_fused_(Tensor(a!) logits, Tensor targets, Tensor expert, Tensor? advantages, Tensor? old_logprobs, "
      "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? weights, Tensor? target_logits, int expert_term, "
      "int policy_term, float[] numbers, float scale, float? cap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("target_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale) -> Tensor");
  m.def("stream_symbol() -> int");  // address of torch's function for the current stream; 0: not found
}

STABLE_TORCH_LIBRARY_IMPL(trapo_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("stream_symbol", TORCH_BOX(&stream_symbol));
}

STABLE_TORCH_LIBRARY_IMPL(trapo_kernels_cuda, TRAPO_DISPATCH_KEY, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("row_grad_", TORCH_BOX(&row_grad_));
  m.impl("row_fused_", TORCH_BOX(&row_fused_));
  m.impl("target_logits", TORCH_BOX(&target_logits_));
}

}  // namespace trapo::cuda
