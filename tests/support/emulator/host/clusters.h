// What blocks of a cluster do with each other's shared memory, on fibers. Stands behind fibers.h.
//
// A store to a neighbour arrives late and in any order, as does an arrival at its mbarrier; the
// bytes that a store counts there are counted with its data or later, never before. The cluster's
// barrier waits for arrivals that come before it, but not for such stores. Reported are a
// store or an arrival at a block that has ended, and mbarriers that are misused: not initialised,
// with more arrivals in a phase than it has places, or two phases ahead of those who wait.

namespace fibers {

inline Block& block_of(int rank) { return *(current->its_block - current->its_block->rank + rank); }

// The same place in the shared memory of a block of this cluster.
inline unsigned char* at_rank(const void* mine, int rank) {
  const auto* p = static_cast<const unsigned char*>(mine);
  return block_of(rank).shared.data() + (p - current->its_block->shared.data());
}
inline Block* owner(const unsigned char* p) {
  for (int rank = 0; rank < grid->cluster; ++rank) {
    Block& block = block_of(rank);
    if (p >= block.shared.data() && p < block.shared.data() + block.shared.size()) return &block;
  }
  return nullptr;
}
// A misuse ends the launch; unlike `fail`, from the scheduler too.
inline void report(Outcome outcome) {
  if (grid->outcome == FINE) grid->outcome = outcome;
}

inline Counter* counter_at(Block& block, const unsigned char* p) {
  const auto found = block.counters.find(p - block.shared.data());
  if (found != block.counters.end()) return &found->second;
  report(MISUSED);
  return nullptr;
}
inline void init_counter(unsigned char* p, int count) {
  Block& block = *current->its_block;
  if (reinterpret_cast<uintptr_t>(p) % 8) fail(UNALIGNED);
  block.counters[p - block.shared.data()] = {count, count, 0, 0, true};
}
inline void count(Counter& counter, int arrivals, long bytes) {
  counter.pending -= arrivals;
  counter.bytes += bytes;
  if (counter.pending < 0 || std::abs(counter.bytes) >= 1 << 20) return report(MISUSED);
  if (counter.pending || counter.bytes) return;
  if (!counter.seen) return report(MISUSED);
  counter.seen = false;
  counter.pending = counter.count;
  ++counter.phase;
  grid->idle = 0;
}
inline void expect_bytes(unsigned char* p, long bytes) {
  if (Counter* counter = counter_at(*current->its_block, p)) count(*counter, 1, bytes);
}
// Whether the phase of this parity has ended. While somebody waits, time passes for what is sent.
inline bool phase_ended(unsigned char* p, unsigned parity) {
  Counter* const counter = counter_at(*current->its_block, p);
  if (!counter) return false;
  const bool ended = (counter->phase & 1u) != parity;
  if (ended)
    counter->seen = true;
  else if (!grid->sent.empty())
    deliver(grid->random() % grid->sent.size());
  return ended;
}

inline void deliver(size_t i) {  // a part of what was sent, or all that is left of it
  if (!grid->sent[i].part()) return;
  std::swap(grid->sent[i], grid->sent.back());
  grid->sent.pop_back();
}
inline void send(std::function<bool()> part, Fiber* arrival) {
  grid->idle = 0;
  grid->sent.push_back({part, arrival});
  if (!grid->shuffled)
    while (!grid->sent.empty()) deliver(0);
}
inline void send_words(unsigned char* to, uint4 value, unsigned char* barrier) {
  Block* const block = owner(to);
  if (reinterpret_cast<uintptr_t>(to) % 16) return fail(UNALIGNED);
  if (!block || owner(barrier) != block) return fail(MISUSED);
  bool written = false;
  const bool apart = grid->random() % 2;
  const auto part = [=]() mutable {
    if (!block->members) {
      report(GONE);
      return true;
    }
    if (!written) {
      memcpy(to, &value, sizeof value);
      written = true;
      if (apart) return false;
    }
    if (Counter* counter = counter_at(*block, barrier)) count(*counter, 0, -16);
    return true;
  };
  send(part, nullptr);
}
inline void send_arrival(unsigned char* barrier) {
  Block* const block = owner(barrier);
  if (!block) return fail(MISUSED);
  const auto part = [=] {
    if (!block->members)
      report(GONE);
    else if (Counter* counter = counter_at(*block, barrier))
      count(*counter, 1, 0);
    return true;
  };
  send(part, current);
}
inline void cluster_barrier() {
  grid->idle = 0;
  for (size_t i = grid->sent.size(); i-- > 0;)
    if (grid->sent[i].arrival == current) deliver(i);
  meet(*current->its_block->cluster);
}

}  // namespace fibers
