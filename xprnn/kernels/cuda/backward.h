// The loop of sequence.backward: all steps of a direction undone in one launch, for a cell with one
// product a step. Stands behind units.h, in front of a cell's file.

namespace xprnn {

// The gradients of the states between the steps, of a thread's units and rows, in shared memory: a
// place for each row of the group, which no other thread reads. `move` takes them from the arrays
// `dstates`, or puts them there at the end.
template <int count>
struct Carried {
  struct Row {
    float2* place;
    XP_FN float2& operator[](int state) const { return place[state * PAIRS]; }
  };
  float2* place;  // of the group's first row
  int begin, end;

  XP_FN Row of(int n) const { return {place + (n - begin) * count * PAIRS}; }
  template <int rows, int stride, int kind>
  XP_FN void move(const Units<kind>& units, float* const (&dstates)[count], bool back) const {
    for (int first = begin; first < end; first += rows)
      for (int row = threadIdx.x / PAIRS; row < smaller(rows, end - first); row += stride)
#pragma unroll
        for (int state = 0; state < count; ++state) {
          float2& here = of(first + row)[state];
          float* const there = dstates[state] + static_cast<Index>(first + row) * units.H;
          if (!back) here.x = here.y = 0;
          if (units.u < units.H && back) units.write(there, here);
          if (units.u < units.H && !back) here = units.read(there);
        }
  }
};

// What all cells do by element. A cell adds what it loads besides doutput; its `step` takes that
// and the gradients after a step, puts dgh, and returns the part of dh that does not go through the
// product.
template <int kind_, int G_, int carried_ = 1>
struct BackwardCell : Units<kind_> {
  static constexpr int kind = kind_, G = G_, carried = carried_;
  typedef typename Numbers<kind>::Element Element;
  using Units<kind>::H;
  using Units<kind>::u;
  using Units<kind>::words;
  struct Inputs {
    float2 doutput;
  };
  const float* doutput;
  const int doutput_stride;
  Element* gates;
  Word* mail;

  XP_FN BackwardCell(const float* doutput_, int doutput_stride_, Element* gates_, Word* mail_,
                     int H_)
      : Units<kind>(H_), doutput(doutput_), doutput_stride(doutput_stride_), gates(gates_),
        mail(mail_) {}

  XP_FN Element* gate_of(Index at, int gate) const { return gates + (at * G + gate) * H; }

  // `before`, `after`: rows of the states; `at`: of arrays that have one for each step. u < H
  XP_FN void load(Inputs& in, Index before, Index after, Index at) const {
    if (doutput) in.doutput = this->read(doutput + at * doutput_stride);
  }
  XP_FN void put(const float2 (&dgh)[G], Index at) const {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      this->publish(mail + (at * G + gate) * words, dgh[gate]);
      if (u < H) this->write(gate_of(at, gate), dgh[gate]);
    }
  }
  XP_FN void spoil(Index at) const {
    float2 nan[G];
#pragma unroll
    for (int gate = 0; gate < G; ++gate) nan[gate] = not_a_number();
    put(nan, at);
  }
};

// All that the block should have written becomes NaN, so that nobody waits for it or uses it.
template <int rows, int stride, class Cell>
XP_FN void give_up(const Cell& cell, const Carried<Cell::carried>& carried,
                   float* const (&dstates)[Cell::carried], const Sequence& sequence, int step) {
  if (threadIdx.x == 0) sequence.fail(step);
  if (!cell.live()) return;
  for (Passes at(sequence, rows, true); !at.done(); at.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, at.end - at.first); row += stride) {
      for (int state = 0; state < Cell::carried; ++state)
        carried.of(at.first + row)[state] = not_a_number();
      cell.spoil(at.walk.at + at.first + row);
    }
}

// Where the weights of the block's units come from: columns of W_hh, gate after gate. This lane's
// begin at `word` of such a column, in which each gate has `words`.
template <int kind, int G>
struct WeightColumns {
  const typename Numbers<kind>::Element* weight_hh;
  int H, words, word;

  XP_FN uint4 operator()(int, int row, int piece) const {
    constexpr int per_word = Numbers<kind>::per_word;
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row, at = word + piece * PIECE;
    const int gate = at / words, first = at % words * per_word;
    Word w[4] = {0, 0, 0, 0};
    if (u >= H || gate >= G) return make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4 * per_word; ++i)
      if (first + i < H) {
        const Index place = static_cast<Index>(gate * H + first + i) * H + u;
        w[i / per_word] |= static_cast<Word>(weight_hh[place]) << i % per_word * 16;
      }
    if constexpr (per_word == 1) {  // as in load_words
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = quiet(w[i]);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// Each block has 16 hidden units of the rows of one group: grid (units, groups, directions). Its
// threads take the gates by element, its warps share out the reduction over the dgh of all blocks.
template <int warps, int chunks, int held, int tiles, class Cell>
XP_FN void undo_steps(const Cell& cell, const typename Cell::Element* weight_hh,
                      float* const (&dstates)[Cell::carried], const Sequence& sequence) {
  constexpr int kind = Cell::kind, G = Cell::G;
  constexpr int rows = 8 * tiles, stride = 32 * warps / PAIRS, partials = warps * rows * PITCH;
  constexpr int most = (rows + stride - 1) / stride;  // rows of a thread in a pass
  XP_SHARED(start);
  const Shared<Stage<CLUSTER, chunks, tiles>, warps, partials> shared = {start};
  Word* const stop = shared.stop();
  uint4* const rest = shared.rest();

  const int thread = threadIdx.x, warp = thread / 32, row_words = G * cell.words;
  const int word = warp * chunks * PIECE + thread % 4 * 4;  // where this lane's share begins
  Fragments<chunks, held> weights[1];
  const int apart = weights[0].rest_of_warp(), begin = blockIdx.y * rows * sequence.passes;
  const WeightColumns<kind, G> source = {weight_hh, cell.H, cell.words, word};
  Stage<CLUSTER, chunks, tiles> stage(shared.staged());
  const bool special = !load_weights(weights, rest + warp * apart, staged(source, stage));
  float2* const place = reinterpret_cast<float2*>(rest + warps * apart) + thread % PAIRS;
  const Carried<Cell::carried> carried = {place, begin,
                                          smaller(begin + rows * sequence.passes, sequence.N)};
  carried.template move<rows, stride>(cell, dstates, false);
  if (thread < 2) stop[thread] = 0;
  sync_block();

  typename Cell::Inputs in[most];
  const auto load = [&](const Passes& at) {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = at.first + row;
      if (row >= rows || n >= at.end) continue;
      in[i] = typename Cell::Inputs();
      if (cell.u < cell.H)
        cell.load(in[i], sequence.before(at.walk) + n, sequence.after(at.walk) + n, at.walk.at + n);
    }
  };
  Passes at(sequence, rows, true);
  if (!at.done()) load(at);
  for (int turn = 0; !at.done(); turn ^= 1) {
    const int first = at.first, end = at.end, step = at.walk.step;
    const Index block = at.walk.at;
    float2 direct[most] = {};
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row < rows && n < end && cell.live())
        direct[i] = cell.step(in[i], carried.of(n), block + n);
    }
    at.next();
    if (!at.done()) load(at);  // on their way while the others are waited for
    float* const sums = shared.sums(turn);
    const Word* const dgh = cell.mail + block * row_words + word;
    if (!multiply_pass<kind, tiles>(sums, weights, source, special, stage, dgh, row_words,
                                    row_words - word, first, end, sequence.spins))
      stop[turn] = 1;
    sync_block();
    if (stop[turn]) {
      give_up<rows, stride>(cell, carried, dstates, sequence, step);
      break;
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row >= rows || n >= end || !cell.live()) continue;
      const float2 sum = total<warps, 1, rows>(sums, 0, row, thread % PAIRS);
      float2& dh = carried.of(n)[0];
      dh.x = direct[i].x + sum.x;
      dh.y = direct[i].y + sum.y;
    }
  }
  carried.template move<rows, stride>(cell, dstates, true);
  stage.close();
}

}  // namespace xprnn
