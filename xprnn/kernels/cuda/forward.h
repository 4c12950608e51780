// The time loop of StepLoop.forward as a persistent kernel: all steps of a direction in one launch,
// for cells with one recurrent product per step. Included after units.h and before a cell's file.
//
// In a wavefront the layers of a stack share a launch, and a layer runs a step as soon as the layer
// below has run it: its blocks poll the exchange buffer of that layer, where every step has its own
// slots, so that no layer waits for those above. Half of a block's warps then multiply by W_ih.

namespace xprnn {

// What an upper layer of a wavefront reads of the layer below; null elsewhere.
template <int mode>
struct LowerLayer {
  const typename Operand<mode>::Element* weight_ih;  // in (G*H, H) of the upper layer
  const Word* exchange;                              // in (N + S, H padded) polled
};

// gx of two units in a wavefront: the stored part plus the product with the layer below.
template <int mode>
struct WavefrontGx : Pair<mode> {
  float2 lower;
  XP_FN void operator=(const Pair<mode>& stored) { this->words = stored.words; }
  XP_FN float x() const { return Pair<mode>::x() + lower.x; }
  XP_FN float y() const { return Pair<mode>::y() + lower.y; }
};
template <int mode, bool wavefront>
struct Input {
  typedef Pair<mode> Gx;
};
template <int mode>
struct Input<mode, true> {
  typedef WavefrontGx<mode> Gx;
};

// The elementwise part common to all cells. A cell adds to Inputs what it needs besides gx; its
// `step` computes from Inputs and gh, writes what is saved, and stores the next states.
template <int mode_, int G_>
struct ForwardCell : Units<mode_> {
  static constexpr int mode = mode_, G = G_;
  typedef typename Operand<mode>::Element Element;
  using Units<mode>::H;
  using Units<mode>::u;
  using Units<mode>::words;
  struct Inputs {
    typename Input<mode, WAVEFRONT>::Gx gx[G];
  };
  Element *gates, *states;
  Word* exchange;

  XP_FN ForwardCell(Element* gates_, Element* states_, Word* exchange_, int H_)
      : Units<mode>(H_), gates(gates_), states(states_), exchange(exchange_) {}

  XP_FN Element* gate_of(Index row, int gate) const { return gates + (row * G + gate) * H; }

  // `before`, `after`: rows of the states; `row`: packed row of gates and saved
  XP_FN void load(Inputs& in, Index before, Index row) const {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      in.gx[gate] = Pair<mode>();
      if (u < H) in.gx[gate] = this->read(gate_of(row, gate));
    }
  }
  XP_FN void prefetch_gx(Index row) const {
    if (u >= H) return;
#pragma unroll
    for (int gate = 0; gate < G; ++gate) prefetch(gate_of(row, gate) + u);
  }
  XP_FN void store(float2 h, Index after) const {
    this->publish(exchange + after * words, h);
    if (u < H && static_cast<void*>(states) != exchange) this->write(states + after * H, h);
  }
  XP_FN void poison(Index after) const { store(nan_pair(), after); }
};

// After a timeout: reports it and fills all states of the block's rows and units with NaN, so that
// other blocks do not wait for them and the results are not used.
template <int rows, int stride, class Cell>
XP_FN void time_out(const Cell& cell, const Sequence& sequence, int step) {
  if (threadIdx.x == 0) sequence.report_timeout(step);
  if (!cell.live()) return;
  for (Passes pass(sequence, rows, false); !pass.done(); pass.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, pass.end - pass.first); row += stride)
      cell.poison(sequence.after(pass.walk) + pass.first + row);
}

// Source of the weights of the block's units: rows of W_hh or W_ih, of which this lane's share
// starts at `word`. The lowest layer of a wavefront has no W_ih here: its gx is computed
// beforehand.
template <int mode>
struct WeightRows {
  const typename Operand<mode>::Element* weight;  // in (G*H, H)
  int H, word;

  XP_FN uint4 operator()(int gate, int row, int k_block) const {
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row;
    if (u >= H || (WAVEFRONT && !weight)) return make_uint4(0, 0, 0, 0);
    const auto* weights = weight + static_cast<Index>(gate * H + u) * H;
    return load_words<mode>(weights, (word + k_block * K_BLOCK_WORDS) * Operand<mode>::per_word, H);
  }
};

// Runs all steps. Each block has 16 hidden units, with all their gates, of the rows of one group:
// grid (units, groups, directions or layers). Its warps split the reduction over h; its threads
// then compute the elementwise part. Blocks past H complete the last cluster: they poll their part
// for the others.
template <int warps, int k_blocks, int in_registers, int row_tiles, class Cell>
XP_FN void forward_steps(const Cell& cell, const typename Cell::Element* weight_hh,
                         const LowerLayer<Cell::mode>& lower, const Sequence& sequence) {
  constexpr int mode = Cell::mode, G = Cell::G;
  constexpr int rows = 8 * row_tiles, stride = 32 * warps / PAIRS;
  constexpr int partials = warps * G * rows * PITCH;
  constexpr int thread_rows = (rows + stride - 1) / stride;  // of a thread, in a pass
  constexpr int sharing = WAVEFRONT ? warps / 2 : warps;     // warps that share a reduction
  XP_SHARED(start);
  const Shared<Stage<CLUSTER, k_blocks, row_tiles>, warps, partials> shared = {start};
  Word* const timed_out = shared.timed_out();
  uint4* const in_shared = shared.weights();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool upper = WAVEFRONT && warp >= sharing;  // warps that multiply by W_ih
  const int share = upper ? warp - sharing : warp;
  const int word = share * k_blocks * K_BLOCK_WORDS + lane % 4 * 4;  // start of the lane's share
  const Word* const exchange = upper ? lower.exchange : cell.exchange;
  Fragments<k_blocks, in_registers> weights[G];
  const WeightRows<mode> source = {upper ? lower.weight_ih : weight_hh, cell.H, word};
  Stage<CLUSTER, k_blocks, row_tiles> stage(shared.staged());
  const bool nonfinite = !load_weights(
      weights, in_shared + warp * G * weights[0].shared_vectors(), staged(source, stage));
  if (thread < 2) timed_out[thread] = 0;
  sync_block();

  int parity = 0;
  for (Passes pass(sequence, rows, false); !pass.done(); pass.next(), parity ^= 1) {
    const Index before = sequence.before(pass.walk), after = sequence.after(pass.walk);
    typename Cell::Inputs in[thread_rows];
    const int row = thread / PAIRS;
    const int own_rows = cell.live() ? smaller(pass.end - pass.first, rows) : 0;
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {  // issued before waiting for the other blocks
      const int n = pass.first + row + i * stride;
      if (row + i * stride < own_rows) cell.load(in[i], before + n, pass.walk.packed + n);
      if (row + i * stride < own_rows && n < pass.walk.next_rows)
        cell.prefetch_gx(pass.walk.next_packed + n);
    }
    float* const sums = shared.sums(parity);
    const Word* const h = exchange + (upper ? after : before) * cell.words + word;
    const int left = WAVEFRONT && !exchange ? 0 : cell.words - word;
    if (!multiply_pass<mode, row_tiles>(sums, weights, source, nonfinite, stage, h, cell.words,
                                        left, pass.first, pass.end, sequence.max_polls))
      timed_out[parity] = 1;
    sync_block();
    if (timed_out[parity]) {
      time_out<rows, stride>(cell, sequence, pass.walk.step);
      break;
    }
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
      const int n = pass.first + row + i * stride;
      if (row + i * stride >= own_rows) continue;
      float2 gh[G];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        gh[gate] = sum_over_warps<sharing, G, rows>(sums, gate, row + i * stride, thread % PAIRS);
        if constexpr (WAVEFRONT)
          in[i].gx[gate].lower = sum_over_warps<sharing, G, rows>(
              sums + partials / 2, gate, row + i * stride, thread % PAIRS);
      }
      cell.step(in[i], gh, after + n, pass.walk.packed + n);
    }
  }
  stage.close();
}

}  // namespace xprnn
