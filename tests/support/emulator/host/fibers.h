// A grid of CUDA threads on one thread of the host.
//
// Every thread is a fiber. Fibers change only where a warp or a block meets and where one waits
// for a word; who is next is drawn from a seed, and now and then one warp is held back for long.
// What is published reaches memory late and in any order, other than for its own thread. So a
// missing barrier or poll gives wrong numbers (shared memory begins as NaN), a wait for what never
// comes is reported instead of lasting, and so are warps that part, unaligned vectors, and writes
// past the end of shared memory. What it cannot see: times, and the accuracy of intrinsics. What
// the blocks of a cluster do with each other's shared memory is in clusters.h.

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

namespace fibers {

enum Outcome { FINE, DEADLOCK, SHARED_OVERRUN, DIVERGED, UNALIGNED, GONE, MISUSED, UNDIVIDED };

constexpr size_t STACK = 64 << 10, GUARD = 1024;
constexpr unsigned char FRESH = 0xff;  // NaN

struct Meeting {  // of a cluster, a block or a warp
  int arrived = 0, members = 0;
  std::vector<int> waiting;
};
struct Warp : Meeting {
  unsigned slots[2][32][6];
  int operation = 0;  // what those who wait are here for
};
struct Counter {  // what stands in shared memory as an mbarrier
  int count, pending;
  long bytes;  // expected and not yet there; negative where they came first
  int phase;
  bool seen;  // whether anybody has seen the end of the phase before
};
struct Block : Meeting {
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::map<size_t, Counter> counters;  // by their place in shared memory
  Meeting* cluster;
  int rank;  // in the cluster
};
struct Fiber {
  jmp_buf state;
  ucontext_t first;
  bool begun = false, done = false;
  Dim thread, block;
  Block* its_block;
  Warp* warp;
  int parity = 0;
};
struct Posted {  // published and not yet in memory
  unsigned* at;
  unsigned value;
  Fiber* by;
};
struct Sent {  // to shared memory of a neighbour, and not yet all there
  std::function<bool()> part;  // a call does one; true: the last
  Fiber* arrival;              // whose it is, of those that barriers wait for
};

struct Grid {
  Dim size;
  int threads, cluster;  // of a block; blocks of a cluster
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Meeting> clusters;
  std::vector<int> ready;  // those who could run, from `next` on
  size_t next = 0;
  std::vector<Posted> posted;
  std::vector<Sent> sent;
  std::mt19937 random;
  bool shuffled = false;
  long idle = 0;  // spins since anything happened
  long alive = 0;
  int waiting = 0;  // the next cluster to become resident
  Warp* held_back = nullptr;
  long held_for = 0;
  Outcome outcome = FINE;
  std::function<void()> kernel;
  char* stacks = nullptr;
  jmp_buf scheduler;
};
inline Grid* grid;
inline Fiber* current;

inline void yield() {
  if (!_setjmp(current->state)) _longjmp(grid->scheduler, 1);
}
inline void fail(Outcome outcome) {  // the scheduler stops before anybody runs again
  grid->outcome = outcome;
  yield();
}
inline int index_of(const Fiber* fiber) { return static_cast<int>(fiber - grid->fibers.data()); }

inline void release(Meeting& meeting) {
  meeting.arrived = 0;
  if (grid->shuffled)
    for (size_t i = meeting.waiting.size(); i > 1; --i)
      std::swap(meeting.waiting[i - 1], meeting.waiting[grid->random() % i]);
  grid->ready.insert(grid->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}
inline void meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.members) return release(meeting);
  meeting.waiting.push_back(index_of(current));
  yield();
}
inline void hold_back(Warp* warp) {
  grid->held_back = warp;
  grid->held_for = 1 + grid->random() % (64 * grid->fibers.size());
}
// All threads of a block; at times one of its warps is the last to go on, and by far.
inline void barrier() {
  Block& block = *current->its_block;
  grid->idle = 0;
  if (grid->shuffled && grid->held_for <= 0 && block.arrived + 1 == block.members)
    if (grid->random() % 4 == 0) hold_back(&block.warps[grid->random() % block.warps.size()]);
  meet(block);
}
inline void spin() {
  ++grid->idle;
  grid->ready.push_back(index_of(current));
  yield();
}

// The words of all lanes of the warp; `operation` tells collectives from each other.
inline unsigned (*collect(int operation, const unsigned* words, int count))[6] {
  Warp& warp = *current->warp;
  if (warp.arrived && warp.operation != operation) fail(DIVERGED);
  warp.operation = operation;
  const int parity = current->parity;
  current->parity ^= 1;
  memcpy(warp.slots[parity][current->thread.x % 32], words, count * sizeof *words);
  meet(warp);
  return warp.slots[parity];
}

void deliver(size_t i);  // one of `sent`: see clusters.h

inline void settle(size_t i) {
  *grid->posted[i].at = grid->posted[i].value;
  grid->posted[i] = grid->posted.back();
  grid->posted.pop_back();
}
inline void post(unsigned* at, unsigned value) {
  grid->idle = 0;
  for (Posted& other : grid->posted)  // one thread's stores to one word stay in order
    if (other.at == at && other.by == current) {
      other.value = value;
      return;
    }
  grid->posted.push_back({at, value, current});
  if (!grid->shuffled) settle(0);
  if (grid->posted.size() > 256) settle(grid->random() % grid->posted.size());
}
inline unsigned peek(const unsigned* at) {
  for (const Posted& mine : grid->posted)
    if (mine.at == at && mine.by == current) return mine.value;
  return *at;
}
inline void aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(UNALIGNED);
}

inline void enter() {
  grid->kernel();
  current->done = true;
  _longjmp(grid->scheduler, 1);
}
inline void admit(int cluster) {
  const int all = grid->threads * grid->cluster;
  for (int i = cluster * all; i < (cluster + 1) * all; ++i) {
    Fiber& fiber = grid->fibers[i];
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = grid->stacks + i * STACK;
    fiber.first.uc_stack.ss_size = STACK;
    makecontext(&fiber.first, enter, 0);
    grid->ready.push_back(i);
  }
}
inline void leave_block(Fiber& fiber) {
  fiber.done = true;
  --grid->alive;
  grid->idle = 0;
  --fiber.warp->members;
  --fiber.its_block->members;
  Meeting& cluster = *fiber.its_block->cluster;
  if (cluster.arrived == --cluster.members && cluster.arrived) release(cluster);
  if (!cluster.members && grid->waiting < (int)grid->clusters.size()) admit(grid->waiting++);
}

// Whether this one has to wait although it could run: it belongs to the warp that is held back.
inline bool passed_over(int i) {
  Grid& g = *grid;
  const long all = static_cast<long>(g.fibers.size());
  if (g.held_for-- <= -all) hold_back(g.fibers[g.random() % all].warp);
  return g.held_for > 0 && g.fibers[i].warp == g.held_back && g.idle < all;
}

inline void schedule() {
  Grid& g = *grid;
  while (g.alive && g.outcome == FINE) {
    if (g.next > 4096 && g.next * 2 > g.ready.size()) {
      g.ready.erase(g.ready.begin(), g.ready.begin() + g.next);
      g.next = 0;
    }
    if (g.next == g.ready.size() || g.idle > 1000 * (long)g.fibers.size()) {
      g.outcome = DEADLOCK;
      return;
    }
    if (!g.posted.empty() && g.random() % 8 == 0) settle(g.random() % g.posted.size());
    if (!g.sent.empty() && g.random() % 8 == 0) deliver(g.random() % g.sent.size());
    const int i = g.ready[g.next++];
    if (g.shuffled && passed_over(i)) {
      g.ready.push_back(i);
      continue;
    }
    current = &g.fibers[i];
    if (!_setjmp(g.scheduler)) {
      if (current->begun) _longjmp(current->state, 1);
      current->begun = true;
      setcontext(&current->first);
    }
    if (current->done) leave_block(*current);
  }
}

// Run a kernel on a grid; at most `resident` blocks at once, 0 for all. Each `cluster` neighbours
// in x are a cluster.
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
  g.fibers = std::vector<Fiber>(g.alive);
  g.blocks.resize(count);
  g.clusters.resize(count / cluster);
  for (Meeting& c : g.clusters) c.members = threads * cluster;
  g.stacks = static_cast<char*>(mmap(nullptr, STACK * g.alive, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int b = 0; b < count; ++b) {
    Block& block = g.blocks[b];
    block.members = threads;
    block.cluster = &g.clusters[b / cluster];
    block.rank = b % cluster;
    block.shared.assign(shared + GUARD, FRESH);
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.members = 32;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = g.fibers[b * threads + t];
      fiber.thread = {t, 0, 0};
      fiber.block = {b % size.x, b / size.x % size.y, b / size.x / size.y};
      fiber.its_block = &block;
      fiber.warp = &block.warps[t / 32];
    }
  }
  const int first = (resident && resident < count ? resident : count) / cluster;
  while (g.waiting < first) admit(g.waiting++);
  if (g.shuffled) std::shuffle(g.ready.begin(), g.ready.end(), g.random);
  if (g.shuffled && g.random() % 4 == 0) hold_back(g.fibers[g.random() % g.fibers.size()].warp);
  schedule();
  while (!g.posted.empty()) settle(0);
  while (!g.sent.empty()) deliver(0);
  for (const Block& block : g.blocks)
    for (size_t i = shared; i < block.shared.size(); ++i)
      if (block.shared[i] != FRESH && g.outcome == FINE) g.outcome = SHARED_OVERRUN;
  munmap(g.stacks, STACK * count * threads);
  grid = nullptr;
  return g.outcome;
}

}  // namespace fibers
