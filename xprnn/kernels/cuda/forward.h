// The loop of sequence.forward: all steps of a direction in one launch, for a cell with one product
// a step. Stands behind units.h, in front of a cell's file.
//
// In a wave the layers of a stack are in one launch, and a layer takes a step as soon as the one
// below has: its blocks poll for that in the mailbox below, where every step has its own place, so
// that nobody waits for those above. Half of a block's warps then multiply by W_ih instead.

namespace xprnn {

// What an upper layer of a wave has of the one below; elsewhere null.
template <int kind>
struct Below {
  const typename Numbers<kind>::Element* weight_ih;  // (G*H, H) read
  const Word* mail;                                  // (N + S, H padded) polled
};

// gx of two units in a wave: what is stored, and what the layer below gives.
template <int kind>
struct WithBelow : Pair<kind> {
  float2 below;
  XP_FN void operator=(const Pair<kind>& stored) { this->words = stored.words; }
  XP_FN float x() const { return Pair<kind>::x() + below.x; }
  XP_FN float y() const { return Pair<kind>::y() + below.y; }
};
template <int kind, bool wave>
struct Input {
  typedef Pair<kind> Gx;
};
template <int kind>
struct Input<kind, true> {
  typedef WithBelow<kind> Gx;
};

// What all cells do by element. A cell has more to load where it needs more than gx; its `step`
// takes that and gh, stores what is kept, and puts the next states.
template <int kind_, int G_>
struct ForwardCell : Units<kind_> {
  static constexpr int kind = kind_, G = G_;
  typedef typename Numbers<kind>::Element Element;
  using Units<kind>::H;
  using Units<kind>::u;
  using Units<kind>::words;
  struct Inputs {
    typename Input<kind, WAVE>::Gx gx[G];
  };
  Element *gates, *states;
  Word* mail;

  XP_FN ForwardCell(Element* gates_, Element* states_, Word* mail_, int H_)
      : Units<kind>(H_), gates(gates_), states(states_), mail(mail_) {}

  XP_FN Element* gate_of(Index at, int gate) const { return gates + (at * G + gate) * H; }

  // `before`, `after`: rows of the states; `at`: of arrays that have one for each step
  XP_FN void load(Inputs& in, Index before, Index at) const {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      in.gx[gate] = Pair<kind>();
      if (u < H) in.gx[gate] = this->read(gate_of(at, gate));
    }
  }
  XP_FN void bring(Index at) const {
    if (u >= H) return;
#pragma unroll
    for (int gate = 0; gate < G; ++gate) prefetch(gate_of(at, gate) + u);
  }
  XP_FN void put(float2 h, Index after) const {
    this->publish(mail + after * words, h);
    if (u < H && static_cast<void*>(states) != mail) this->write(states + after * H, h);
  }
  XP_FN void spoil(Index after) const { put(not_a_number(), after); }
};

// All states of the block's rows and units become NaN, so that nobody waits for them or uses them.
template <int rows, int stride, class Cell>
XP_FN void give_up(const Cell& cell, const Sequence& sequence, int step) {
  if (threadIdx.x == 0) sequence.fail(step);
  if (!cell.live()) return;
  for (Passes at(sequence, rows, false); !at.done(); at.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, at.end - at.first); row += stride)
      cell.spoil(sequence.after(at.walk) + at.first + row);
}

// Where the weights of the block's units come from: rows of W_hh or W_ih, of which this lane's part
// begins at `word`. The lowest layer of a wave has none of the latter, its gx is made before.
template <int kind>
struct WeightRows {
  const typename Numbers<kind>::Element* weight;
  int H, word;

  XP_FN uint4 operator()(int gate, int row, int piece) const {
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row;
    if (u >= H || (WAVE && !weight)) return make_uint4(0, 0, 0, 0);
    const auto* weights = weight + static_cast<Index>(gate * H + u) * H;
    return load_words<kind>(weights, (word + piece * PIECE) * Numbers<kind>::per_word, H);
  }
};

// Each block has 16 hidden units of the rows of one group, all their gates: grid (units, groups,
// directions or layers). Its warps share out the reduction over h; the sums then go to the threads, by
// element. Blocks past H fill the last cluster: they poll for their part, as the others need it.
template <int warps, int chunks, int held, int tiles, class Cell>
XP_FN void take_steps(const Cell& cell, const typename Cell::Element* weight_hh,
                      const Below<Cell::kind>& below, const Sequence& sequence) {
  constexpr int kind = Cell::kind, G = Cell::G;
  constexpr int rows = 8 * tiles, stride = 32 * warps / PAIRS, partials = warps * G * rows * PITCH;
  constexpr int most = (rows + stride - 1) / stride;  // rows of a thread in a pass
  constexpr int sharing = WAVE ? warps / 2 : warps;   // warps that share a reduction
  XP_SHARED(start);
  const Shared<Stage<CLUSTER, chunks, tiles>, warps, partials> shared = {start};
  Word* const stop = shared.stop();
  uint4* const rest = shared.rest();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool upper = WAVE && warp >= sharing;  // of the warps: those for the layer below
  const int share = upper ? warp - sharing : warp;
  const int word = share * chunks * PIECE + lane % 4 * 4;  // where this lane's share of h begins
  const Word* const mail = upper ? below.mail : cell.mail;
  Fragments<chunks, held> weights[G];
  const WeightRows<kind> source = {upper ? below.weight_ih : weight_hh, cell.H, word};
  Stage<CLUSTER, chunks, tiles> stage(shared.staged());
  const bool special =
      !load_weights(weights, rest + warp * G * weights[0].rest_of_warp(), staged(source, stage));
  if (thread < 2) stop[thread] = 0;
  sync_block();

  int turn = 0;
  for (Passes at(sequence, rows, false); !at.done(); at.next(), turn ^= 1) {
    const Index before = sequence.before(at.walk), after = sequence.after(at.walk);
    typename Cell::Inputs in[most];
    const int row = thread / PAIRS, mine = cell.live() ? smaller(at.end - at.first, rows) : 0;
#pragma unroll
    for (int i = 0; i < most; ++i) {  // on their way while the others are waited for
      const int n = at.first + row + i * stride;
      if (row + i * stride < mine) cell.load(in[i], before + n, at.walk.at + n);
      if (row + i * stride < mine && n < at.walk.next_rows) cell.bring(at.walk.next_at + n);
    }
    float* const sums = shared.sums(turn);
    const Word* const h = mail + (upper ? after : before) * cell.words + word;
    const int left = WAVE && !mail ? 0 : cell.words - word;
    if (!multiply_pass<kind, tiles>(sums, weights, source, special, stage, h, cell.words, left,
                                    at.first, at.end, sequence.spins))
      stop[turn] = 1;
    sync_block();
    if (stop[turn]) {
      give_up<rows, stride>(cell, sequence, at.walk.step);
      break;
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int n = at.first + row + i * stride;
      if (row + i * stride >= mine) continue;
      float2 gh[G];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        gh[gate] = total<sharing, G, rows>(sums, gate, row + i * stride, thread % PAIRS);
        if constexpr (WAVE)
          in[i].gx[gate].below = total<sharing, G, rows>(sums + partials / 2, gate,
                                                         row + i * stride, thread % PAIRS);
      }
      cell.step(in[i], gh, after + n, at.walk.at + n);
    }
  }
  stage.close();
}

}  // namespace xprnn
