// A grid of CUDA threads on one thread of the host.
//
// An emulator: every CUDA thread has its own stack, and one thread runs at a time. Threads switch
// only at barriers of a warp or a block and between polls. The next thread is drawn at random from
// a seed, and sometimes one warp is delayed for a long time. Published stores reach memory late and
// in any order, except for the thread that made them. Therefore a missing barrier or poll gives
// wrong values (shared memory is filled with NaN at first). Deadlocks, diverged warps, unaligned
// vectors and writes past the end of shared memory are reported. Not emulated: time, and the
// accuracy of intrinsics. For the shared memory of clusters see clusters.h.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <tuple>
#include <vector>

struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Dim { int x, y, z; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

enum Outcome {
  FINE, DEADLOCK, SHARED_OVERRUN, DIVERGED, UNALIGNED, BLOCK_ENDED, MISUSED, UNDIVIDED
};

constexpr size_t STACK = 64 << 10, GUARD = 1024;
constexpr unsigned char UNINITIALISED = 0xff;  // NaN

struct SyncGroup {  // a cluster, a block or a warp, at its barriers
  int arrived = 0, members = 0;
  std::vector<int> waiting;
};
struct Warp : SyncGroup {
  unsigned slots[2][32][6];
  int operation = 0;  // of the collective that the waiting lanes are in
};
struct Mbarrier {  // in shared memory
  int count, pending;
  long bytes;  // expected and not received; negative if they arrived before
  int phase;
  bool seen;  // whether the end of the previous phase has been observed
};
struct Block : SyncGroup {
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
  SyncGroup* cluster;
  int rank;  // in the cluster
};
struct Thread {
  jmp_buf state;
  ucontext_t first;
  bool begun = false, done = false;
  Dim thread_index, block_index;
  Block* parent;
  Warp* warp;
  int parity = 0;
};
struct PendingStore {  // published, not yet in memory
  unsigned* at;
  unsigned value;
  Thread* by;
};
struct PendingSend {  // to the shared memory of another block, not yet complete
  std::function<bool()> part;  // performs one part; true: the last one
  Thread* arrival;              // its thread, if it is an arrival, for which barriers wait
};

struct Grid {
  Dim size;
  int threads, cluster;  // threads of a block, blocks of a cluster
  std::vector<Thread> all_threads;
  std::vector<Block> blocks;
  std::vector<SyncGroup> clusters;
  std::vector<int> ready;  // threads that can run, from `next` on
  size_t next = 0;
  std::vector<PendingStore> pending_stores;
  std::vector<PendingSend> pending_sends;
  std::mt19937 random;
  bool shuffled = false;
  long idle = 0;  // polls since the last progress
  long alive = 0;
  int next_cluster = 0;  // to become resident
  Warp* delayed_warp = nullptr;
  long delay_left = 0;
  Outcome outcome = FINE;
  std::function<void()> kernel;
  char* stacks = nullptr;
  jmp_buf scheduler;
};
inline Grid* grid;
inline Thread* current;

inline void yield() {
  if (!_setjmp(current->state)) _longjmp(grid->scheduler, 1);
}
inline void fail(Outcome outcome) {  // the scheduler then stops the launch
  grid->outcome = outcome;
  yield();
}
inline int index_of(const Thread* thread) {
  return static_cast<int>(thread - grid->all_threads.data());
}

inline void release(SyncGroup& group) {
  group.arrived = 0;
  if (grid->shuffled)
    for (size_t i = group.waiting.size(); i > 1; --i)
      std::swap(group.waiting[i - 1], group.waiting[grid->random() % i]);
  grid->ready.insert(grid->ready.end(), group.waiting.begin(), group.waiting.end());
  group.waiting.clear();
}
inline void arrive_and_wait(SyncGroup& group) {
  if (++group.arrived == group.members) return release(group);
  group.waiting.push_back(index_of(current));
  yield();
}
inline void delay_warp(Warp* warp) {
  grid->delayed_warp = warp;
  grid->delay_left = 1 + grid->random() % (64 * grid->all_threads.size());
}
// Barrier of a block; sometimes one of its warps is delayed for a long time afterwards.
inline void barrier() {
  Block& block = *current->parent;
  grid->idle = 0;
  if (grid->shuffled && grid->delay_left <= 0 && block.arrived + 1 == block.members)
    if (grid->random() % 4 == 0) delay_warp(&block.warps[grid->random() % block.warps.size()]);
  arrive_and_wait(block);
}
inline void poll_again() {
  ++grid->idle;
  grid->ready.push_back(index_of(current));
  yield();
}

// The words of all lanes of the warp; `operation` identifies the collective.
inline unsigned (*collect(int operation, const unsigned* words, int count))[6] {
  Warp& warp = *current->warp;
  if (warp.arrived && warp.operation != operation) fail(DIVERGED);
  warp.operation = operation;
  const int parity = current->parity;
  current->parity ^= 1;
  memcpy(warp.slots[parity][current->thread_index.x % 32], words, count * sizeof *words);
  arrive_and_wait(warp);
  return warp.slots[parity];
}

void deliver(size_t i);  // one of `pending_sends`: see clusters.h

inline void commit_store(size_t i) {
  *grid->pending_stores[i].at = grid->pending_stores[i].value;
  grid->pending_stores[i] = grid->pending_stores.back();
  grid->pending_stores.pop_back();
}
inline void store_later(unsigned* at, unsigned value) {
  grid->idle = 0;
  for (PendingStore& other : grid->pending_stores)  // a thread's stores to one word stay in order
    if (other.at == at && other.by == current) {
      other.value = value;
      return;
    }
  grid->pending_stores.push_back({at, value, current});
  if (!grid->shuffled) commit_store(0);
  if (grid->pending_stores.size() > 256) commit_store(grid->random() % grid->pending_stores.size());
}
inline unsigned load(const unsigned* at) {
  for (const PendingStore& own : grid->pending_stores)
    if (own.at == at && own.by == current) return own.value;
  return *at;
}
inline void aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(UNALIGNED);
}

inline void thread_main() {
  grid->kernel();
  current->done = true;
  _longjmp(grid->scheduler, 1);
}
inline void start_cluster(int cluster) {
  const int all = grid->threads * grid->cluster;
  for (int i = cluster * all; i < (cluster + 1) * all; ++i) {
    Thread& thread = grid->all_threads[i];
    getcontext(&thread.first);
    thread.first.uc_stack.ss_sp = grid->stacks + i * STACK;
    thread.first.uc_stack.ss_size = STACK;
    makecontext(&thread.first, thread_main, 0);
    grid->ready.push_back(i);
  }
}
inline void end_thread(Thread& thread) {
  thread.done = true;
  --grid->alive;
  grid->idle = 0;
  --thread.warp->members;
  --thread.parent->members;
  SyncGroup& cluster = *thread.parent->cluster;
  if (cluster.arrived == --cluster.members && cluster.arrived) release(cluster);
  if (!cluster.members && grid->next_cluster < (int)grid->clusters.size())
    start_cluster(grid->next_cluster++);
}

// Whether a thread that could run must wait because its warp is delayed.
inline bool is_delayed(int i) {
  Grid& g = *grid;
  const long all = static_cast<long>(g.all_threads.size());
  if (g.delay_left-- <= -all) delay_warp(g.all_threads[g.random() % all].warp);
  return g.delay_left > 0 && g.all_threads[i].warp == g.delayed_warp && g.idle < all;
}

inline void schedule() {
  Grid& g = *grid;
  while (g.alive && g.outcome == FINE) {
    if (g.next > 4096 && g.next * 2 > g.ready.size()) {
      g.ready.erase(g.ready.begin(), g.ready.begin() + g.next);
      g.next = 0;
    }
    if (g.next == g.ready.size() || g.idle > 1000 * (long)g.all_threads.size()) {
      g.outcome = DEADLOCK;
      return;
    }
    if (!g.pending_stores.empty() && g.random() % 8 == 0)
      commit_store(g.random() % g.pending_stores.size());
    if (!g.pending_sends.empty() && g.random() % 8 == 0)
      deliver(g.random() % g.pending_sends.size());
    const int i = g.ready[g.next++];
    if (g.shuffled && is_delayed(i)) {
      g.ready.push_back(i);
      continue;
    }
    current = &g.all_threads[i];
    if (!_setjmp(g.scheduler)) {
      if (current->begun) _longjmp(current->state, 1);
      current->begun = true;
      setcontext(&current->first);
    }
    if (current->done) end_thread(*current);
  }
}

// Runs a kernel on a grid, with at most `resident` blocks at once, 0 for all. `cluster` adjacent
// blocks in x form a cluster.
inline Outcome launch(Dim size, int threads, size_t shared, unsigned seed, int resident,
                      std::function<void()> kernel, int cluster = 1) {
  if (size.x % cluster) return UNDIVIDED;
  Grid g;
  grid = &g;
  g.size = size;
  g.threads = threads;
  g.cluster = cluster;
  g.kernel = kernel;
  g.random.seed(seed);
  g.shuffled = seed != 0;
  const int count = size.x * size.y * size.z;
  g.alive = static_cast<long>(count) * threads;
  g.all_threads = std::vector<Thread>(g.alive);
  g.blocks.resize(count);
  g.clusters.resize(count / cluster);
  for (SyncGroup& c : g.clusters) c.members = threads * cluster;
  g.stacks = static_cast<char*>(mmap(nullptr, STACK * g.alive, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int b = 0; b < count; ++b) {
    Block& block = g.blocks[b];
    block.members = threads;
    block.cluster = &g.clusters[b / cluster];
    block.rank = b % cluster;
    block.shared.assign(shared + GUARD, UNINITIALISED);
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.members = 32;
    for (int t = 0; t < threads; ++t) {
      Thread& thread = g.all_threads[b * threads + t];
      thread.thread_index = {t, 0, 0};
      thread.block_index = {b % size.x, b / size.x % size.y, b / size.x / size.y};
      thread.parent = &block;
      thread.warp = &block.warps[t / 32];
    }
  }
  const int first = (resident && resident < count ? resident : count) / cluster;
  while (g.next_cluster < first) start_cluster(g.next_cluster++);
  if (g.shuffled) std::shuffle(g.ready.begin(), g.ready.end(), g.random);
  if (g.shuffled && g.random() % 4 == 0)
    delay_warp(g.all_threads[g.random() % g.all_threads.size()].warp);
  schedule();
  while (!g.pending_stores.empty()) commit_store(0);
  while (!g.pending_sends.empty()) deliver(0);
  for (const Block& block : g.blocks)
    for (size_t i = shared; i < block.shared.size(); ++i)
      if (block.shared[i] != UNINITIALISED && g.outcome == FINE) g.outcome = SHARED_OVERRUN;
  munmap(g.stacks, STACK * count * threads);
  grid = nullptr;
  return g.outcome;
}

}  // namespace emulator
