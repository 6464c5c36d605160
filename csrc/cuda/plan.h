// How a row of V logits is laid over threads, clusters and shared memory: the one table.
#pragma once

#include <algorithm>
#include <cstdint>

namespace trapo::cuda {

constexpr int kPiece = 16;  // bytes of one access, the widest there is
// Rows are cut where these begin: two sectors of 32 bytes, so that no two warps share one. Allocations of torch begin at a
// multiple of it, on CPUs too, so sums do not depend on where a buffer lies.
constexpr int kLine = 64;
constexpr int kLargestBlock = 1024;
constexpr int kMaxStages = 4;
constexpr int kReserved = 1024;  // bytes of shared memory that CUDA takes for each block

// Most threads a block. fp64 takes twice the registers. A row that is read twice gets many, so that few rows are under way
// at once and L2 holds them.
constexpr int max_threads(int64_t itemsize) { return itemsize == 8 ? 256 : 512; }
constexpr int max_threads_of_long_row(int64_t itemsize) { return itemsize == 8 ? 256 : kLargestBlock; }

struct Device {
  int arch;           // compute capability 9.0 is 90
  int shared_per_sm;  // bytes
};

struct Plan {
  int threads;
  int cluster;  // blocks that share a row
  int stages;   // groups of asynchronous copies; the reduction of one overlaps the arrival of the next
  int slots;    // pieces of the row that a block holds in shared memory; 0: none, the row is read twice
  int shared;   // bytes of dynamic shared memory
};

// Blocks a row and blocks an SM, best first. Three blocks an SM: one loads, one computes, one stores. The first choice
// that fits is taken. A cluster costs a barrier across SMs, so it is as small as it can be; sm_80 has none.
struct Choice {
  int min_arch, max_arch, cluster, blocks_per_sm;
};
constexpr Choice kChoices[] = {
    {80, 999, 1, 3}, {90, 999, 2, 3}, {90, 999, 4, 3},  {90, 999, 8, 3},
    {90, 999, 8, 2}, {90, 109, 16, 3}, {90, 109, 16, 2}, {80, 89, 1, 2},
};

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Pieces of a row whose start may lie anywhere in a line.
constexpr int64_t pieces_of(int64_t vocab, int64_t itemsize) { return div_up(vocab * itemsize + kLine - itemsize, kPiece); }

// About 8 pieces a thread, so that 128 bytes a thread are on their way at once. A warp at least.
inline int threads_for(int64_t pieces, int most) {
  int threads = 32;
  while (threads < most && threads * 8 < pieces) threads *= 2;
  return threads;
}

// stats, grad_, and fused_ where the row does not stay on chip.
inline Plan streamed_plan(int64_t vocab, int64_t itemsize, int scratch, int most) {
  return {threads_for(pieces_of(vocab, itemsize), most), 1, 1, 0, scratch};
}

inline Plan fused_plan(int64_t vocab, int64_t itemsize, int scratch, Device device) {
  for (const Choice& choice : kChoices) {
    if (device.arch < choice.min_arch || device.arch > choice.max_arch) continue;
    const int64_t slots = round_up(div_up(pieces_of(vocab, itemsize), choice.cluster), kLine / kPiece);
    const int64_t shared = scratch + slots * kPiece;
    if (shared + kReserved > device.shared_per_sm / choice.blocks_per_sm) continue;
    const int threads = threads_for(slots, max_threads(itemsize));
    const int stages = int(std::clamp<int64_t>(div_up(slots, threads) / 2, 1, kMaxStages));
    return {threads, choice.cluster, stages, int(slots), int(shared)};
  }
  return streamed_plan(vocab, itemsize, scratch, max_threads_of_long_row(itemsize));
}

}  // namespace trapo::cuda
