// A CUDA device on a CPU: every CUDA thread is a fiber, one block (or one cluster of blocks) runs at a time.
//
// The headers in include/ bear the names of CUDA's and give kernels what they use of them, so that a .cu file compiles as
// C++, unchanged. What this device does that a real one does only on a bad day:
//
//   order      threads run ahead of each other as far as barriers let them: the lowest first, the highest first, or a
//              seeded random one at a time (SIMT_ORDER = asc, desc, or a number)
//   barriers   one that a thread of the block does not reach, or that threads reach at different lines, ends the process
//              with a report of who waits where; so does a shuffle without all lanes of its mask
//   memory     shared memory is a heap block of its exact size, full of NaN, and gone when its block has left; what an
//              asynchronous copy will fill is NaN until the copying thread has waited for it
//   sanitizers AddressSanitizer and UBSan follow the fibers. ThreadSanitizer is told of fibers, and of the order that
//              barriers give and shuffles do not, so that it reports a missing barrier in whichever order threads ran
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__) && !defined(SIMT_TRAFFIC)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr unsigned kLanes = 32;
#if defined(SIMT_ASAN)
constexpr size_t kStackBytes = 128 * 1024;
#elif defined(SIMT_TSAN)
constexpr size_t kStackBytes = 64 * 1024;
#else
constexpr size_t kStackBytes = 32 * 1024;
#endif

[[noreturn]] inline void die(const std::string& message) {
  std::fprintf(stderr, "simt: %s\n", message.c_str());
  std::fflush(stderr);
  std::_Exit(70);
}

// Sanitizers -----------------------------------------------------------------------------------------------------

// The device's own bookkeeping is no part of the search for races.
struct Quiet {
#ifdef SIMT_TSAN
  Quiet() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Quiet() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Quiet() {}
  ~Quiet() {}
#endif
};

// What happened before `release` of a place happened before what follows a later `acquire` of it.
#ifdef SIMT_TSAN
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
#else
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// Fibers ---------------------------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "simt.h: write simt_switch for this CPU"
#endif
// Saves the registers that a call preserves on the stack and goes on from another stack.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
  .pushsection .text
  .weak simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
  .popsection
)");

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Place {  // where a thread waits
  const char* what = nullptr;
  int line = 0;
  bool operator==(const Place& other) const { return what == other.what && line == other.line; }
  std::string text() const { return std::string(what) + " (line " + std::to_string(line) + ")"; }
};

struct Thread {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  unsigned block = 0, index = 0;  // of the cluster, of the block
  bool done = false;
  Place place;
  uint64_t slots[2] = {0, 0};  // what it gives in a shuffle; two, so that nobody is overtaken
  unsigned shuffles = 0;
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, committed
#ifdef SIMT_ASAN
  void* fake_stack = nullptr;
#endif
#ifdef SIMT_TSAN
  void* tsan = nullptr;
#endif
};

struct Barrier {
  unsigned arrived = 0, phase = 0;
  Place place;
  char order[2];  // for `release` and `acquire`, by parity of the phase
};

struct Block {
  uint3 index;
  unsigned first = 0, left = 0;  // its threads: where they begin, how many have not returned
  unsigned char* shared = nullptr;
  Barrier barrier;
  std::vector<Barrier> warps, shuffles;
};

// What the process says of itself as a device.
struct Model {
  int arch = 90, shared_per_sm = 228 * 1024;
  unsigned largest_cluster = 16;  // of blocks that can be on the device at once
  std::string order = "asc";
};
inline Model& model() {
  static Model* made = [] {
    auto* m = new Model;
    if (const char* order = std::getenv("SIMT_ORDER")) m->order = order;
    if (const char* arch = std::getenv("SIMT_ARCH")) m->arch = std::atoi(arch);
    if (const char* bytes = std::getenv("SIMT_SHARED_PER_SM")) m->shared_per_sm = std::atoi(bytes);
    if (const char* blocks = std::getenv("SIMT_LARGEST_CLUSTER")) m->largest_cluster = unsigned(std::atoi(blocks));
    return m;
  }();
  return *made;
}

struct Device {
  dim3 grid, block;
  unsigned cluster = 1, threads_per_block = 0;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  std::vector<Block> blocks;     // of the cluster that runs
  std::vector<Thread> threads;   // of all its blocks
  std::vector<uint64_t> runnable;  // a bit a thread
  Thread* current = nullptr;
  Barrier cluster_barrier;
  void* scheduler = nullptr;  // its stack pointer
  std::mt19937 random;
  char start, finish;  // for `release` and `acquire`
#ifdef SIMT_ASAN
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
#endif
#ifdef SIMT_TSAN
  void* scheduler_tsan = nullptr;
  std::vector<void*> retired;
#endif
};
inline Device& device() {
  static Device* made = new Device;
  return *made;
}
inline Thread& self() { return *device().current; }
inline Block& here() { return device().blocks[self().block]; }

inline void set_runnable(unsigned thread, bool value) {
  uint64_t& word = device().runnable[thread / 64];
  const uint64_t bit = uint64_t(1) << thread % 64;
  word = value ? word | bit : word & ~bit;
}

inline void to_thread(Thread& thread) {
  Device& d = device();
  d.current = &thread;
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(thread.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack.get(), kStackBytes);
#endif
  simt_switch(&d.scheduler, thread.stack_pointer);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void to_scheduler(bool forever) {
  Device& d = device();
  Thread& thread = self();
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(d.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(forever ? nullptr : &thread.fake_stack, d.scheduler_stack, d.scheduler_bytes);
#endif
  simt_switch(&thread.stack_pointer, d.scheduler);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(thread.fake_stack, &d.scheduler_stack, &d.scheduler_bytes);
#endif
  (void)forever;
}

// Barriers -------------------------------------------------------------------------------------------------------

inline unsigned id_of(const Thread& thread) { return device().blocks[thread.block].first + thread.index; }

inline std::string name_of(const Thread& thread) {
  const Device& d = device();
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(d.blocks[thread.block].index.x);
}

inline void sleep_at(Place place) {
  Thread& thread = self();
  thread.place = place;
  set_runnable(id_of(thread), false);
  to_scheduler(false);
}

// Waits for `count` threads, the woken of which are those of `first .. first + span` in `mask` (by lane). The last one to
// come goes on at once.
inline void meet(Barrier& barrier, Place place, unsigned count, unsigned first, unsigned span, uint32_t mask) {
  if (barrier.arrived == 0) barrier.place = place;
  if (!(barrier.place == place))
    die("diverged barrier: " + name_of(self()) + " is at " + place.text() + ", others are at " + barrier.place.text());
  if (++barrier.arrived < count) return sleep_at(place);
  barrier.arrived = 0, ++barrier.phase;
  for (unsigned i = 0; i < span; ++i)
    if (mask >> i % kLanes & 1) set_runnable(first + i, true);
}

inline void sync_threads(const char* what, int line, Barrier& barrier, unsigned count, unsigned first, unsigned span,
                         uint32_t mask) {
  char* order = nullptr;
  {
    Quiet quiet;
    order = &barrier.order[barrier.phase % 2];
  }
  release(order);
  {
    Quiet quiet;
    meet(barrier, {what, line}, count, first, span, mask);
  }
  acquire(order);
}

inline const char* const kClusterBarrier = "cluster barrier";

inline void cluster_arrive(int line) {
  char* order = nullptr;
  {
    Quiet quiet;
    order = &device().cluster_barrier.order[device().cluster_barrier.phase % 2];
  }
  release(order);
  Quiet quiet;
  Device& d = device();
  Thread& thread = self();
  if (thread.cluster_arrivals++ != thread.cluster_waits)
    die(name_of(thread) + " arrives twice at the cluster's barrier without waiting, line " + std::to_string(line));
  if (++d.cluster_barrier.arrived < d.threads.size()) return;
  d.cluster_barrier.arrived = 0;
  ++d.cluster_barrier.phase;
  for (Thread& other : d.threads)
    if (!other.done && other.place.what == kClusterBarrier && other.cluster_waits != other.cluster_arrivals)
      set_runnable(id_of(other), true);
}

inline void cluster_wait(int line) {
  char* order = nullptr;
  {
    Quiet quiet;
    Device& d = device();
    Thread& thread = self();
    if (thread.cluster_arrivals != thread.cluster_waits + 1)
      die(name_of(thread) + " waits for the cluster's barrier without having arrived, line " + std::to_string(line));
    order = &d.cluster_barrier.order[thread.cluster_waits % 2];
    if (d.cluster_barrier.phase == thread.cluster_waits) sleep_at({kClusterBarrier, line});
    ++thread.cluster_waits;
    thread.place = {};
  }
  acquire(order);
}

// The value of lane `from` of those in `mask`, which all call this. No memory is ordered by it.
template <class T>
T shuffle(uint32_t mask, T value, unsigned from, const char* what, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Quiet quiet;
  Device& d = device();
  Thread& thread = self();
  const unsigned lane = thread.index % kLanes, warp = thread.index / kLanes;
  if (!(mask >> lane & 1)) die(name_of(thread) + " is not in its own mask, line " + std::to_string(line));
  if (!(mask >> from & 1)) die(name_of(thread) + " reads a lane that is not in the mask, line " + std::to_string(line));
  const unsigned first = here().first + warp * kLanes, lanes = std::min(kLanes, d.threads_per_block - warp * kLanes);
  const uint32_t present = lanes == kLanes ? ~0u : (1u << lanes) - 1;
  if (mask & ~present) die(name_of(thread) + " has lanes in its mask that do not exist, line " + std::to_string(line));
  const unsigned slot = thread.shuffles++ % 2;
  std::memcpy(&thread.slots[slot], &value, sizeof value);
  meet(here().shuffles[warp], {what, line}, unsigned(__builtin_popcount(mask)), first, lanes, mask);
  T out;
  std::memcpy(&out, &d.threads[first + from].slots[slot], sizeof out);
  return out;
}

// Memory ---------------------------------------------------------------------------------------------------------

inline unsigned char* poisoned(size_t bytes) {
  auto* out = static_cast<unsigned char*>(std::malloc(bytes));
  std::memset(out, 0xff, bytes);
  return out;
}

inline unsigned char* dynamic_shared() {
  Quiet quiet;
  return here().shared;
}

template <class T>
T* of_block(T* mine, unsigned rank) {
  Quiet quiet;
  Device& d = device();
  if (rank >= d.cluster) die(name_of(self()) + " maps shared memory of block " + std::to_string(rank) + " of its cluster");
  const auto offset = reinterpret_cast<unsigned char*>(mine) - here().shared;
  return reinterpret_cast<T*>(d.blocks[rank].shared + offset);
}

struct alignas(16) Sixteen {
  uint64_t x[2];
};

inline void copy_async(void* to, const void* from, size_t bytes) {
  if (bytes != sizeof(Sixteen)) die("asynchronous copies are of 16 bytes here");
  const Sixteen nothing{{~uint64_t(0), ~uint64_t(0)}};
  *static_cast<Sixteen*>(to) = nothing;
  Quiet quiet;
  self().copies.push_back({to, from, self().groups});
}
inline void commit_copies() {
  Quiet quiet;
  ++self().groups;
}
// As late as they may come, copies arrive when they are waited for.
inline void wait_for_copies(int but) {
  std::vector<Copy> due;
  {
    Quiet quiet;
    Thread& thread = self();
    const auto rest = std::stable_partition(thread.copies.begin(), thread.copies.end(),
                                            [&](const Copy& copy) { return copy.group < thread.groups - but; });
    due.assign(thread.copies.begin(), rest);
    thread.copies.erase(thread.copies.begin(), rest);
  }
  for (const Copy& copy : due) *static_cast<Sixteen*>(copy.to) = *static_cast<const Sixteen*>(copy.from);
}

// Launches -------------------------------------------------------------------------------------------------------

inline void leave() {
  Quiet quiet;
  Device& d = device();
  Thread& thread = self();
  thread.done = true;
  set_runnable(id_of(thread), false);
  Block& block = here();
  if (--block.left == 0 && d.shared_bytes > 0) {  // the shared memory of a block ends with it
    std::memset(block.shared, 0xff, d.shared_bytes);
#ifdef SIMT_ASAN
    ASAN_POISON_MEMORY_REGION(block.shared, d.shared_bytes);
#endif
  }
}

inline void run_thread() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &device().scheduler_stack, &device().scheduler_bytes);
#endif
  acquire(&device().start);
  device().kernel();
  release(&device().finish);
  leave();
  to_scheduler(true);
  die("a thread that had left was resumed");
}

inline void prepare(Thread& thread, unsigned block, unsigned index) {
  std::unique_ptr<char[]> stack = std::move(thread.stack);
#ifdef SIMT_TSAN
  stack.reset();  // so that a new thread's stack has no old accesses
#endif
  if (!stack) stack.reset(new char[kStackBytes]);
#ifdef SIMT_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack.get(), kStackBytes);
#endif
  std::vector<Copy> copies = std::move(thread.copies);
  copies.clear();
  thread = Thread{};
  thread.block = block, thread.index = index, thread.copies = std::move(copies);
  // Staggered, or the tops of all stacks would contend for a few lines of the CPU's caches.
  const size_t down = size_t(index) * 320 % 4096;
  const auto top = reinterpret_cast<uintptr_t>(stack.get() + kStackBytes - down) / 16 * 16;
  auto* words = reinterpret_cast<uint64_t*>(top) - 2;  // the alignment that a function expects when it is entered
  *words = reinterpret_cast<uint64_t>(&run_thread);
  words -= 6;
  std::fill(words, words + 6, 0);
  thread.stack_pointer = words;
  thread.stack = std::move(stack);
#ifdef SIMT_TSAN
  thread.tsan = __tsan_create_fiber(0);
#endif
}

inline void report_deadlock() {
  const Device& d = device();
  std::string text = "deadlock: a barrier that not every thread reaches.";
  for (const Block& block : d.blocks)
    for (unsigned i = 0; i < d.threads_per_block;) {
      const auto state = [&](unsigned at) {
        const Thread& thread = d.threads[block.first + at];
        return thread.done ? std::string("returned") : "at " + thread.place.text();
      };
      const unsigned from = i;
      while (i < d.threads_per_block && state(i) == state(from)) ++i;
      text += "\n  block " + std::to_string(block.index.x) + ", threads " + std::to_string(from) + " to " +
              std::to_string(i - 1) + ": " + state(from);
    }
  die(text);
}

// The next thread by the order, or −1.
inline int choose() {
  Device& d = device();
  const size_t words = d.runnable.size();
  const std::string& order = model().order;
  if (order == "desc") {
    for (size_t i = words; i-- > 0;)
      if (d.runnable[i]) return int(i * 64 + 63 - __builtin_clzll(d.runnable[i]));
    return -1;
  }
  const size_t from = order == "asc" ? 0 : d.random() % d.threads.size();
  for (size_t k = 0; k <= words; ++k) {
    const size_t i = (from / 64 + k) % words;
    const uint64_t word = d.runnable[i] & (k == 0 ? ~uint64_t(0) << from % 64 : ~uint64_t(0));
    if (word) return int(i * 64 + __builtin_ctzll(word));
  }
  return -1;
}

inline void run_cluster(unsigned first_block) {
  Device& d = device();
  const unsigned n = d.threads_per_block, all = n * d.cluster, warps = (n + kLanes - 1) / kLanes;
  d.threads.resize(all);
  d.runnable.assign((all + 63) / 64, 0);
  d.cluster_barrier = Barrier{};
  d.blocks.assign(d.cluster, Block{});
  for (unsigned b = 0; b < d.cluster; ++b) {
    Block& block = d.blocks[b];
    block.index = {first_block + b, 0, 0}, block.first = b * n, block.left = n;
    block.warps.resize(warps), block.shuffles.resize(warps);
    block.shared = poisoned(d.shared_bytes);
    for (unsigned i = 0; i < n; ++i) prepare(d.threads[b * n + i], b, i), set_runnable(b * n + i, true);
  }
  for (int next = choose(); next >= 0; next = choose()) to_thread(d.threads[size_t(next)]);
  if (std::any_of(d.threads.begin(), d.threads.end(), [](const Thread& t) { return !t.done; })) report_deadlock();
  for (Block& block : d.blocks) {
#ifdef SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(block.shared, d.shared_bytes);
#endif
    std::free(block.shared);
  }
#ifdef SIMT_TSAN
  // Later, since the identity of a destroyed fiber is given to the next one.
  for (Thread& thread : d.threads) d.retired.push_back(thread.tsan);
  for (; d.retired.size() > 2048; d.retired.erase(d.retired.begin())) __tsan_destroy_fiber(d.retired.front());
#endif
}

template <class Kernel>
void launch(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, Kernel kernel) {
  Device& d = device();
  release(&d.start);
  {
    Quiet quiet;
    d.grid = grid, d.block = block, d.cluster = cluster, d.threads_per_block = block.x, d.shared_bytes = shared_bytes;
    d.kernel = kernel;
    const std::string& order = model().order;
    if (order != "asc" && order != "desc") d.random.seed(unsigned(std::atoi(order.c_str())));
#ifdef SIMT_TSAN
    d.scheduler_tsan = __tsan_get_current_fiber();
#endif
    for (unsigned i = 0; i < grid.x; i += cluster) run_cluster(order == "desc" ? grid.x - cluster - i : i);
    d.current = nullptr;
  }
  acquire(&d.finish);
}

}  // namespace simt
