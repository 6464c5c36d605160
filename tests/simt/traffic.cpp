// Counts what the kernels ask of memory. They are compiled for ThreadSanitizer and linked with this file in its place, so
// that every load and store of theirs calls a hook below. Prints a JSON list, an object a launch:
//
//     reads, writes of the logits: bytes; accesses, of which wide ones (16 bytes); sectors: the distinct 32-byte sectors
//     that a warp's access touches, added up over warps and accesses (the k-th access of an instruction by each lane is
//     taken for one access of the warp)
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "cuda_runtime.h"
#include "row_kernels.h"

namespace {

struct Count {
  uint64_t bytes = 0, accesses = 0, wide = 0;
  std::map<std::pair<unsigned, uintptr_t>, uint64_t> occurrence;  // by thread of the grid and instruction
  std::map<std::tuple<unsigned, uintptr_t, uint64_t>, std::set<uintptr_t>> sectors;  // by warp, instruction, occurrence

  void add(unsigned thread, uintptr_t instruction, uintptr_t address, size_t size) {
    bytes += size, ++accesses, wide += size == 16;
    auto& touched = sectors[{thread / 32, instruction, occurrence[{thread, instruction}]++}];
    for (uintptr_t sector = address / 32; sector <= (address + size - 1) / 32; ++sector) touched.insert(sector);
  }
  void print(const char* name) const {
    uint64_t n = 0;
    for (const auto& [key, touched] : sectors) n += touched.size();
    std::printf("\"%s\": {\"bytes\": %lu, \"accesses\": %lu, \"wide\": %lu, \"sectors\": %lu}", name, bytes, accesses, wide, n);
  }
};

uintptr_t from = 0, to = 0;  // the logits
Count counts[2];             // reads, writes

void hit(void* address, size_t size, bool write, void* instruction) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at < from || at >= to) return;
  const auto& device = simt::device();
  const auto& thread = *device.current;
  const unsigned id = device.blocks[thread.block].index.x * 1024 + thread.index;
  counts[write].add(id, reinterpret_cast<uintptr_t>(instruction), at, size);
}

}  // namespace

#define HOOK(name, size, write) \
  extern "C" void name(void* at) { hit(at, size, write, __builtin_return_address(0)); }
#define HOOKS(size)                                \
  HOOK(__tsan_read##size, size, false)             \
  HOOK(__tsan_write##size, size, true)             \
  HOOK(__tsan_unaligned_read##size, size, false)   \
  HOOK(__tsan_unaligned_write##size, size, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_read_range(void* at, size_t size) { hit(at, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t size) { hit(at, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

using namespace trapo;
using cuda::Dtype;

namespace {

struct Model {
  const char* name;
  int arch, shared_per_sm;
};

bool first = true;

void measure(const char* verb, const Model& model, Dtype dtype, int size, int vocab, int skip) {
  const int rows = 2;
  simt::model().arch = model.arch, simt::model().shared_per_sm = model.shared_per_sm;
  std::vector<uint64_t> memory((size_t(rows) * size_t(vocab) + size_t(skip)) * size_t(size) / 8 + 32);
  const uintptr_t line = (reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128;
  from = line + uintptr_t(skip * size), to = from + uintptr_t(rows) * uintptr_t(vocab) * uintptr_t(size);
  const std::vector<int64_t> targets{0, vocab / 2};
  const bool expert[] = {true, true};
  std::vector<double> vectors(8 * rows, 0.5);
  const auto vector = [&](int i) { return static_cast<void*>(&vectors[size_t(i * rows)]); };
  const cuda::Logits logits{reinterpret_cast<void*>(from), dtype, rows, vocab, vocab, targets.data(), 0, nullptr};
  const Terms<double> terms{kSft, kNoPolicy, 1, 0.1, 0.1, 0, INFINITY, INFINITY, 0, 0, 0};
  counts[0] = counts[1] = Count{};
  if (verb[0] == 's')
    cuda::stats(logits, {vector(0), vector(1), vector(2), vector(3)});
  else if (verb[0] == 'g')
    cuda::grad(logits, {vector(0), vector(1), vector(2), nullptr, vector(4), nullptr});
  else
    cuda::fused(logits, {expert, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, terms, 1}, {vector(0), vector(1), vector(2), vector(3)});
  const cuda::Plan plan = cuda::plan_of_fused(vocab, dtype);
  std::printf("%s{\"verb\": \"%s\", \"device\": \"%s\", \"itemsize\": %d, \"rows\": %d, \"vocab\": %d, \"skip\": %d, ",
              first ? "" : ",\n", verb, model.name, size, rows, vocab, skip);
  std::printf("\"cluster\": %d, \"on_chip\": %s, ", plan.cluster, plan.slots > 0 ? "true" : "false");
  counts[0].print("reads"), std::printf(", "), counts[1].print("writes"), std::printf("}");
  first = false;
}

}  // namespace

int main() {
  const Model a100{"A100", 80, 164 * 1024}, h100{"H100", 90, 228 * 1024};
  std::printf("[");
  for (const int vocab : {4096, 50257, 152064}) {
    measure("stats", h100, Dtype::kBfloat16, 2, vocab, 0), measure("grad_", h100, Dtype::kBfloat16, 2, vocab, 0);
    measure("fused_", h100, Dtype::kBfloat16, 2, vocab, 0), measure("fused_", a100, Dtype::kBfloat16, 2, vocab, 0);
  }
  measure("fused_", h100, Dtype::kBfloat16, 2, 262144, 0), measure("fused_", h100, Dtype::kFloat32, 4, 50257, 3);
  measure("stats", h100, Dtype::kFloat32, 4, 50257, 3), measure("grad_", h100, Dtype::kFloat32, 4, 50257, 3);
  measure("fused_", h100, Dtype::kFloat16, 2, 50257, 5);
  std::printf("]\n");
}
