// Exchange of states between the blocks of a persistent kernel, and the order of its steps.
// Included after math_mode.h.
//
// At every step all blocks need the states that all blocks have computed. They pass them through an
// exchange buffer in global memory. Each of its slots is written once: the buffer is filled with
// SENTINEL before the launch, and a reader polls the very words that it needs. Therefore no flags,
// fences or grid barriers are needed, but all blocks must be resident. A wait times out after
// `max_polls` polls.

namespace xprnn {

#ifndef XP_WAVEFRONT
#define XP_WAVEFRONT 0  // 1: blockIdx.z is the layer of a stack, else the direction
#endif

constexpr int K_BLOCK_WORDS = 16;  // a k-block: words of an exchange row that a warp polls together
constexpr bool WAVEFRONT = XP_WAVEFRONT;
constexpr int MAX_WAVEFRONT_LAYERS = 8;

// Iterates over the steps of a direction, in its order; as PackedBatch.walk.
struct Walk {
  const int* counts;  // (steps,) rows of each step, or null: N rows at every step
  int steps, N;       // N: rows that run at least one step
  bool down;          // from the last step to the first
  int step, rows, packed;  // packed: first packed row of the step
  int next_rows, next_packed, last_packed;

  XP_FN Walk(const int* counts_, int steps_, int N_, int total_rows, bool down_)
      : counts(counts_), steps(steps_), N(N_), down(down_), step(0), last_packed(0) {
    rows = count(0);
    packed = down ? total_rows - rows : 0;
    look_ahead();
  }
  XP_FN int count(int i) const { return counts ? counts[down ? steps - 1 - i : i] : N; }
  XP_FN void look_ahead() {
    next_rows = step + 1 < steps ? count(step + 1) : 0;
    next_packed = down ? packed - next_rows : packed + rows;
  }
  XP_FN void next() {
    ++step;
    last_packed = packed;
    packed = next_packed;
    rows = next_rows;
    look_ahead();
  }
  XP_FN bool done() const { return step >= steps; }
  // First state rows before and after the step in time: those of t - 1 and of t
  XP_FN Index low() const {
    if (step == (down ? steps - 1 : 0)) return 0;
    return static_cast<Index>(N) + (down ? next_packed : last_packed);
  }
  XP_FN Index high() const { return static_cast<Index>(N) + packed; }
};

// The array arguments of all directions or layers of a launch. blockIdx.z is the direction, of
// which the second runs in reverse; in a wavefront it is the layer, and all run forward. Passed as
// a const __grid_constant__ parameter, so that it is read in place; selecting a direction by an
// index instead of ?: takes more registers.
template <class Arrays>
struct GroupedArguments {
  Arrays slots[WAVEFRONT ? MAX_WAVEFRONT_LAYERS : 2];
  XP_FN Arrays own() const {
    if (WAVEFRONT) return slots[blockIdx.z];
    return blockIdx.z ? slots[1] : slots[0];
  }
};

// The steps and rows of a launch; the same in all sequence kernels.
struct Sequence {
  const int* counts;  // in (T,) rows of each step, or null: N at every step
  int T, N, S;        // S: sum of the counts
  int passes;         // passes over the rows of a group, in each step
  int reverse;        // of the first direction
  Word max_polls;     // of a wait; then it times out
  Word* report;       // out (1,) host memory: tag + step at a timeout
  Word tag;

  XP_FN bool reversed() const { return reverse || (!WAVEFRONT && blockIdx.z); }
  XP_FN Walk walk(bool backward) const { return Walk(counts, T, N, S, reversed() != backward); }
  // First rows of the states that a step of the direction reads and writes
  XP_FN Index before(const Walk& walk) const { return reversed() ? walk.high() : walk.low(); }
  XP_FN Index after(const Walk& walk) const { return reversed() ? walk.low() : walk.high(); }
  XP_FN void report_timeout(int step) const {
    store_to_host(report, tag + smaller(step, 0xffffff));
  }
};

// Iterates over the passes of a block: the rows of its group, `rows` at once, step after step.
struct Passes {
  Walk walk;
  const int begin, limit, rows;  // begin, limit: first row of the group and its end
  int first, end;                // this pass has rows first .. min(first + rows, end) - 1

  XP_FN Passes(const Sequence& sequence, int rows_, bool backward)
      : walk(sequence.walk(backward)),
        begin(blockIdx.y * rows_ * sequence.passes),
        limit(begin + rows_ * sequence.passes),
        rows(rows_) {
    enter();
  }
  XP_FN void enter() {
    while (!walk.done() && walk.rows <= begin) walk.next();
    first = begin;
    end = smaller(limit, walk.rows);
  }
  XP_FN void next() {
    first += rows;
    if (first < end) return;
    walk.next();
    enter();
  }
  XP_FN bool done() const { return walk.done(); }
};

enum PollResult { TIMED_OUT, FINITE, MAYBE_NONFINITE };

// Consecutive k-blocks of a row, of which `words` words remain from p on.
struct RowBlocks {
  const Word* p;
  int words;
  XP_FN bool has(int k) const { return k * K_BLOCK_WORDS < words; }
  XP_FN const Word* at(int k) const { return p + k * K_BLOCK_WORDS; }
};

// Polls until every lane has its 16 bytes of `count` k-blocks; zeros for those past the row's end.
template <int mode, int count, class Blocks>
XP_FN PollResult await(uint4 (&b)[count], const Blocks& blocks, Word max_polls) {
  for (;;) {
    bool full = true;
#pragma unroll
    for (int k = 0; k < count; ++k)
      b[k] = blocks.has(k) ? poll4(blocks.at(k)) : make_uint4(0, 0, 0, 0);
    if constexpr (mode == TF32X3) {  // SENTINEL is a NaN: finite words have been written
      bool finite = true;  // last k-block first, or the compiler tests some before it loads all
#pragma unroll
      for (int k = count - 1; k >= 0; --k) finite = finite && is_finite(b[k]);
      if (all_lanes(finite)) return FINITE;
    }
#pragma unroll
    for (int k = 0; k < count; ++k)
      full = full && b[k].x != SENTINEL && b[k].y != SENTINEL &&
             b[k].z != SENTINEL && b[k].w != SENTINEL;
    if (all_lanes(full)) return MAYBE_NONFINITE;
    if (!max_polls--) return TIMED_OUT;
    pause();
  }
}

}  // namespace xprnn
