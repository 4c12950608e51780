// Emulation of accesses to the shared memory of other blocks of a cluster. Included after
// emulator.h.
//
// A store to another block takes effect late and in any order, as does an arrival at its mbarrier;
// the bytes of a store are counted at the mbarrier with its data or later, never before. The
// cluster's barrier waits for arrivals made before it, but not for such stores. Reported are
// stores and arrivals at a block that has ended, and misused mbarriers: not initialised, with more
// arrivals in a phase than it was initialised for, or two phases ahead of the waiting threads.

namespace emulator {

inline Block& block_of(int rank) { return *(current->parent - current->parent->rank + rank); }

// The same address in the shared memory of a block of this cluster.
inline unsigned char* at_rank(const void* own, int rank) {
  const auto* p = static_cast<const unsigned char*>(own);
  return block_of(rank).shared.data() + (p - current->parent->shared.data());
}
inline Block* owner(const unsigned char* p) {
  for (int rank = 0; rank < grid->cluster; ++rank) {
    Block& block = block_of(rank);
    if (p >= block.shared.data() && p < block.shared.data() + block.shared.size()) return &block;
  }
  return nullptr;
}
// Ends the launch; unlike `fail`, it can be called from the scheduler.
inline void report(Outcome outcome) {
  if (grid->outcome == FINE) grid->outcome = outcome;
}

inline Mbarrier* mbarrier_at(Block& block, const unsigned char* p) {
  const auto found = block.mbarriers.find(p - block.shared.data());
  if (found != block.mbarriers.end()) return &found->second;
  report(MISUSED);
  return nullptr;
}
inline void init_mbarrier(unsigned char* p, int count) {
  Block& block = *current->parent;
  if (reinterpret_cast<uintptr_t>(p) % 8) fail(UNALIGNED);
  block.mbarriers[p - block.shared.data()] = {count, count, 0, 0, true};
}
inline void count(Mbarrier& mbarrier, int arrivals, long bytes) {
  mbarrier.pending -= arrivals;
  mbarrier.bytes += bytes;
  if (mbarrier.pending < 0 || std::abs(mbarrier.bytes) >= 1 << 20) return report(MISUSED);
  if (mbarrier.pending || mbarrier.bytes) return;
  if (!mbarrier.seen) return report(MISUSED);
  mbarrier.seen = false;
  mbarrier.pending = mbarrier.count;
  ++mbarrier.phase;
  grid->idle = 0;
}
inline void expect_bytes(unsigned char* p, long bytes) {
  if (Mbarrier* mbarrier = mbarrier_at(*current->parent, p)) count(*mbarrier, 1, bytes);
}
// Whether the phase of this parity has ended. If not, a pending send makes progress.
inline bool phase_ended(unsigned char* p, unsigned parity) {
  Mbarrier* const mbarrier = mbarrier_at(*current->parent, p);
  if (!mbarrier) return false;
  const bool ended = (mbarrier->phase & 1u) != parity;
  if (ended)
    mbarrier->seen = true;
  else if (!grid->pending_sends.empty())
    deliver(grid->random() % grid->pending_sends.size());
  return ended;
}

inline void deliver(size_t i) {  // performs a part of a send
  if (!grid->pending_sends[i].part()) return;
  std::swap(grid->pending_sends[i], grid->pending_sends.back());
  grid->pending_sends.pop_back();
}
inline void send(std::function<bool()> part, Thread* arrival) {
  grid->idle = 0;
  grid->pending_sends.push_back({part, arrival});
  if (!grid->shuffled)
    while (!grid->pending_sends.empty()) deliver(0);
}
inline void send_words(unsigned char* to, uint4 value, unsigned char* barrier) {
  Block* const block = owner(to);
  if (reinterpret_cast<uintptr_t>(to) % 16) return fail(UNALIGNED);
  if (!block || owner(barrier) != block) return fail(MISUSED);
  bool written = false;
  const bool in_two_parts = grid->random() % 2;
  const auto part = [=]() mutable {
    if (!block->members) {
      report(BLOCK_ENDED);
      return true;
    }
    if (!written) {
      memcpy(to, &value, sizeof value);
      written = true;
      if (in_two_parts) return false;
    }
    if (Mbarrier* mbarrier = mbarrier_at(*block, barrier)) count(*mbarrier, 0, -16);
    return true;
  };
  send(part, nullptr);
}
inline void send_arrival(unsigned char* barrier) {
  Block* const block = owner(barrier);
  if (!block) return fail(MISUSED);
  const auto part = [=] {
    if (!block->members)
      report(BLOCK_ENDED);
    else if (Mbarrier* mbarrier = mbarrier_at(*block, barrier))
      count(*mbarrier, 1, 0);
    return true;
  };
  send(part, current);
}
inline void cluster_barrier() {
  grid->idle = 0;
  for (size_t i = grid->pending_sends.size(); i-- > 0;)
    if (grid->pending_sends[i].arrival == current) deliver(i);
  arrive_and_wait(*current->parent->cluster);
}

}  // namespace emulator
