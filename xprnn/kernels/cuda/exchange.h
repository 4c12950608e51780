// How the blocks of a kernel that runs a whole sequence exchange what every step of a recurrence
// needs of all of them, and which steps there are. Stands behind numbers.h.
//
// Numbers go from block to block through a mailbox in global memory, which nobody writes twice:
// it is EMPTY before the launch, and whoever needs a word polls for that word itself. So there is
// no flag, no fence and no barrier of the grid, but all blocks must be resident. A wait that
// takes too long is given up.

namespace xprnn {

#ifndef XP_WAVE
#define XP_WAVE 0  // 1: what stands side by side in the grid's third size is layers
#endif

constexpr int PIECE = 16;  // words of a row of the mailbox that a warp polls for together
constexpr bool WAVE = XP_WAVE;
constexpr int LAYERS = 8;  // of a wave, at most

// The steps of a direction in the order in which it takes them, as layout.walk.
struct Walk {
  const int* counts;  // (steps,) or null: N rows at every step
  int steps, N;       // N: the rows that take at least one step
  bool down;          // from the last step to the first
  int step, rows, at;
  int next_rows, next_at, last_at;

  XP_FN Walk(const int* counts_, int steps_, int N_, int total, bool down_)
      : counts(counts_), steps(steps_), N(N_), down(down_), step(0), last_at(0) {
    rows = count(0);
    at = down ? total - rows : 0;
    look_ahead();
  }
  XP_FN int count(int i) const { return counts ? counts[down ? steps - 1 - i : i] : N; }
  XP_FN void look_ahead() {
    next_rows = step + 1 < steps ? count(step + 1) : 0;
    next_at = down ? at - next_rows : at + rows;
  }
  XP_FN void next() {
    ++step;
    last_at = at;
    at = next_at;
    rows = next_rows;
    look_ahead();
  }
  XP_FN bool done() const { return step >= steps; }
  // First rows of the states on either side of the step, in time: base(t - 1) and base(t)
  XP_FN Index low() const {
    if (step == (down ? steps - 1 : 0)) return 0;
    return static_cast<Index>(N) + (down ? next_at : last_at);
  }
  XP_FN Index high() const { return static_cast<Index>(N) + at; }
};

// A direction has its own arrays. A launch has one direction, or two side by side: blocks with
// z = 1 then have the second ones, and go in reverse. A parameter of type const __grid_constant__,
// so that it is read where it stands; an index instead of a choice takes more registers. In a wave
// z is the layer, and all go forward.
template <class Arrays>
struct Beside {
  Arrays of[WAVE ? LAYERS : 2];
  XP_FN Arrays here() const {
    if (WAVE) return of[blockIdx.z];
    return blockIdx.z ? of[1] : of[0];
  }
};

// What says which steps there are, and of which rows; the same in all sequence kernels.
struct Sequence {
  const int* counts;  // (T,) rows of each step, or null for N at all of them
  int T, N, S;        // S: the sum of the counts
  int passes;         // each group has so many times the rows of a pass
  int reverse;        // of the first direction
  Word spins;    // polls before a wait is given up
  Word* report;  // one word of the host; = tag + step when that happens
  Word tag;

  XP_FN bool reversed() const { return reverse || (!WAVE && blockIdx.z); }
  XP_FN Walk walk(bool undo) const { return Walk(counts, T, N, S, reversed() != undo); }
  // First rows of the states that a step of the direction reads and writes
  XP_FN Index before(const Walk& walk) const { return reversed() ? walk.high() : walk.low(); }
  XP_FN Index after(const Walk& walk) const { return reversed() ? walk.low() : walk.high(); }
  XP_FN void fail(int step) const { tell_host(report, tag + smaller(step, 0xffffff)); }
};

// The passes of a block over the rows of its group, `rows` at once, step after step.
struct Passes {
  Walk walk;
  const int begin, limit, rows;  // of the group: its first row, and where it ends
  int first, end;                // the rows of this pass are first .. min(first + rows, end) - 1

  XP_FN Passes(const Sequence& sequence, int rows_, bool undo)
      : walk(sequence.walk(undo)),
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

enum Arrival { NEVER, THERE, SPECIAL };  // SPECIAL: there, perhaps with infinities or NaNs

// Pieces that follow each other in a row, of which `words` words are left from p on.
struct InRow {
  const Word* p;
  int words;
  XP_FN bool has(int k) const { return k * PIECE < words; }
  XP_FN const Word* at(int k) const { return p + k * PIECE; }
};

// Poll until every lane has its 16 bytes of `count` pieces; those that `pieces` has not are zeros.
template <int kind, int count, class Pieces>
XP_FN Arrival await(uint4 (&b)[count], const Pieces& pieces, Word spins) {
  for (;;) {
    bool full = true;
#pragma unroll
    for (int k = 0; k < count; ++k)
      b[k] = pieces.has(k) ? poll4(pieces.at(k)) : make_uint4(0, 0, 0, 0);
    if constexpr (kind == TF32X3) {  // EMPTY is a NaN: what is finite is there
      bool finite = true;  // the last one first: else the compiler looks before it asks for all
#pragma unroll
      for (int k = count - 1; k >= 0; --k) finite = finite && is_finite(b[k]);
      if (all_lanes(finite)) return THERE;
    }
#pragma unroll
    for (int k = 0; k < count; ++k)
      full = full && b[k].x != EMPTY && b[k].y != EMPTY && b[k].z != EMPTY && b[k].w != EMPTY;
    if (all_lanes(full)) return SPECIAL;
    if (!spins--) return NEVER;
    pause();
  }
}

}  // namespace xprnn
