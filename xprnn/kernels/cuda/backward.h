// The time loop of StepLoop.backward as a persistent kernel: all backward steps of a direction in
// one launch, for cells with one recurrent product per step. Included after units.h and before a
// cell's file.

namespace xprnn {

// The gradients of the states that are passed from step to step, of a thread's units and rows, in
// shared memory: one slot for each row of the group, which no other thread accesses.
template <int count>
struct StateGradients {
  struct Row {
    float2* slot;
    XP_FN float2& operator[](int state) const { return slot[state * PAIRS]; }
  };
  float2* slots;  // from the group's first row on
  int begin, end;

  XP_FN Row of(int n) const { return {slots + (n - begin) * count * PAIRS}; }
  // Copies the arrays `dstates` (N, H) to the slots, or with `to_arrays` the slots to them.
  template <int rows, int stride, int mode>
  XP_FN void copy(const Units<mode>& units, float* const (&dstates)[count],
                  bool to_arrays) const {
    for (int first = begin; first < end; first += rows)
      for (int row = threadIdx.x / PAIRS; row < smaller(rows, end - first); row += stride)
#pragma unroll
        for (int state = 0; state < count; ++state) {
          float2& slot = of(first + row)[state];
          float* const dstate = dstates[state] + static_cast<Index>(first + row) * units.H;
          if (!to_arrays) slot.x = slot.y = 0;
          if (units.u < units.H && to_arrays) units.write(dstate, slot);
          if (units.u < units.H && !to_arrays) slot = units.read(dstate);
        }
  }
};

// The elementwise part common to all cells. A cell adds to Inputs what it needs besides doutput;
// its `step` computes from Inputs and the gradients of the states after a step, stores dgh, and
// returns the part of dh that does not go through the recurrent product.
template <int mode_, int G_, int state_count_ = 1>
struct BackwardCell : Units<mode_> {
  static constexpr int mode = mode_, G = G_, state_count = state_count_;
  typedef typename Operand<mode>::Element Element;
  using Units<mode>::H;
  using Units<mode>::u;
  using Units<mode>::words;
  struct Inputs {
    float2 doutput;
  };
  const float* doutput;
  const int doutput_stride;
  Element* gates;
  Word* exchange;

  XP_FN BackwardCell(const float* doutput_, int doutput_stride_, Element* gates_, Word* exchange_,
                     int H_)
      : Units<mode>(H_), doutput(doutput_), doutput_stride(doutput_stride_), gates(gates_),
        exchange(exchange_) {}

  XP_FN Element* gate_of(Index row, int gate) const { return gates + (row * G + gate) * H; }

  // `before`, `after`: rows of the states; `row`: packed row of doutput, gates and saved. u < H
  XP_FN void load(Inputs& in, Index before, Index after, Index row) const {
    if (doutput) in.doutput = this->read(doutput + row * doutput_stride);
  }
  XP_FN void store(const float2 (&dgh)[G], Index row) const {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      this->publish(exchange + (row * G + gate) * words, dgh[gate]);
      if (u < H) this->write(gate_of(row, gate), dgh[gate]);
    }
  }
  XP_FN void poison(Index row) const {
    float2 nan[G];
#pragma unroll
    for (int gate = 0; gate < G; ++gate) nan[gate] = nan_pair();
    store(nan, row);
  }
};

// After a timeout: reports it and fills everything that the block should have written with NaN, so
// that other blocks do not wait for it and the results are not used.
template <int rows, int stride, class Cell>
XP_FN void time_out(const Cell& cell, const StateGradients<Cell::state_count>& gradients,
                    float* const (&dstates)[Cell::state_count], const Sequence& sequence,
                    int step) {
  if (threadIdx.x == 0) sequence.report_timeout(step);
  if (!cell.live()) return;
  for (Passes pass(sequence, rows, true); !pass.done(); pass.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, pass.end - pass.first);
         row += stride) {
      for (int state = 0; state < Cell::state_count; ++state)
        gradients.of(pass.first + row)[state] = nan_pair();
      cell.poison(pass.walk.packed + pass.first + row);
    }
}

// Source of the weights of the block's units: columns of W_hh, gate after gate. This lane's share
// starts at `word` of such a column, in which each gate has `words` words. The first argument, the
// gate of WeightRows, is always 0.
template <int mode, int G>
struct WeightColumns {
  const typename Operand<mode>::Element* weight_hh;  // in (G*H, H)
  int H, words, word;

  XP_FN uint4 operator()(int, int row, int k_block) const {
    constexpr int per_word = Operand<mode>::per_word;
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row;
    const int at = word + k_block * K_BLOCK_WORDS;
    const int gate = at / words, first = at % words * per_word;
    Word w[4] = {0, 0, 0, 0};
    if (u >= H || gate >= G) return make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4 * per_word; ++i)
      if (first + i < H) {
        const Index element = static_cast<Index>(gate * H + first + i) * H + u;
        w[i / per_word] |= static_cast<Word>(weight_hh[element]) << i % per_word * 16;
      }
    if constexpr (per_word == 1) {  // as in load_words
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = canonical_nan(w[i]);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// Runs all backward steps. Each block has 16 hidden units of the rows of one group: grid (units,
// groups, directions). Its threads compute the elementwise part; its warps then split the reduction
// over the dgh of all blocks.
template <int warps, int k_blocks, int in_registers, int row_tiles, class Cell>
XP_FN void backward_steps(const Cell& cell, const typename Cell::Element* weight_hh,
                          float* const (&dstates)[Cell::state_count], const Sequence& sequence) {
  constexpr int mode = Cell::mode, G = Cell::G;
  constexpr int rows = 8 * row_tiles, stride = 32 * warps / PAIRS;
  constexpr int partials = warps * rows * PITCH;
  constexpr int thread_rows = (rows + stride - 1) / stride;  // of a thread, in a pass
  XP_SHARED(start);
  const Shared<Stage<CLUSTER, k_blocks, row_tiles>, warps, partials> shared = {start};
  Word* const timed_out = shared.timed_out();
  uint4* const in_shared = shared.weights();

  const int thread = threadIdx.x, warp = thread / 32, row_words = G * cell.words;
  const int word = warp * k_blocks * K_BLOCK_WORDS + thread % 4 * 4;  // start of the lane's share
  Fragments<k_blocks, in_registers> weights[1];
  const int warp_vectors = weights[0].shared_vectors();
  const int begin = blockIdx.y * rows * sequence.passes;
  const WeightColumns<mode, G> source = {weight_hh, cell.H, cell.words, word};
  Stage<CLUSTER, k_blocks, row_tiles> stage(shared.staged());
  const bool nonfinite =
      !load_weights(weights, in_shared + warp * warp_vectors, staged(source, stage));
  float2* const slots =
      reinterpret_cast<float2*>(in_shared + warps * warp_vectors) + thread % PAIRS;
  const StateGradients<Cell::state_count> gradients = {
      slots, begin, smaller(begin + rows * sequence.passes, sequence.N)};
  gradients.template copy<rows, stride>(cell, dstates, false);
  if (thread < 2) timed_out[thread] = 0;
  sync_block();

  typename Cell::Inputs in[thread_rows];
  const auto load = [&](const Passes& pass) {
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
      const int row = thread / PAIRS + i * stride, n = pass.first + row;
      if (row >= rows || n >= pass.end) continue;
      in[i] = typename Cell::Inputs();
      if (cell.u < cell.H)
        cell.load(in[i], sequence.before(pass.walk) + n, sequence.after(pass.walk) + n,
                  pass.walk.packed + n);
    }
  };
  Passes pass(sequence, rows, true);
  if (!pass.done()) load(pass);
  for (int parity = 0; !pass.done(); parity ^= 1) {
    const int first = pass.first, end = pass.end, step = pass.walk.step;
    const Index packed = pass.walk.packed;
    float2 direct[thread_rows] = {};
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row < rows && n < end && cell.live())
        direct[i] = cell.step(in[i], gradients.of(n), packed + n);
    }
    pass.next();
    if (!pass.done()) load(pass);  // issued before waiting for the other blocks
    float* const sums = shared.sums(parity);
    const Word* const dgh = cell.exchange + packed * row_words + word;
    if (!multiply_pass<mode, row_tiles>(sums, weights, source, nonfinite, stage, dgh, row_words,
                                        row_words - word, first, end, sequence.max_polls))
      timed_out[parity] = 1;
    sync_block();
    if (timed_out[parity]) {
      time_out<rows, stride>(cell, gradients, dstates, sequence, step);
      break;
    }
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row >= rows || n >= end || !cell.live()) continue;
      const float2 sum = sum_over_warps<warps, 1, rows>(sums, 0, row, thread % PAIRS);
      float2& dh = gradients.of(n)[0];
      dh.x = direct[i].x + sum.x;
      dh.y = direct[i].y + sum.y;
    }
  }
  gradients.template copy<rows, stride>(cell, dstates, true);
  stage.close();
}

}  // namespace xprnn
