// The Elman cell backward over a whole sequence in one launch: StepLoop.backward with RNN.backward
// of cells/rnn.py. Included after rnn.h and backward.h.

namespace xprnn {

template <int mode, bool relu>
struct RnnBackward : BackwardCell<mode, 1> {
  typedef BackwardCell<mode, 1> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<mode> h_next;
  };
  const Element* states;

  XP_FN RnnBackward(const Base& base, const Element* states_) : Base(base), states(states_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index row) const {
    in.h_next = this->read(states + after * this->H);
    Base::load(in, before, after, row);
  }
  XP_FN float2 step(const Inputs& in, StateGradients<1>::Row dstates, Index row) const {
    const float2 dh = dstates[0];
    float2 dgh[1], direct;
    dgh[0].x = rnn_step_backward<relu>(dh.x + in.doutput.x, in.h_next.x());
    dgh[0].y = rnn_step_backward<relu>(dh.y + in.doutput.y, in.h_next.y());
    this->store(dgh, row);
    direct.x = direct.y = 0;
    return direct;
  }
};

template <int mode>
struct RnnBackwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (H, H)
  const Element* states;     // in     (N + S, H)
  const float* doutput;      // in     (S, H), row stride `doutput_stride`; null for zeros
  Element* gates;            // out    (S, H): dgh
  float* dh;                 // inout  (N, H): of the final states -> of the initial states
  Word* exchange;            // inout  (S, H padded): SENTINEL -> dgh
};

// The other parameters are those of `Sequence` in the forward pass; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles, bool relu>
XP_KERNEL(32 * warps)
rnn_backward(const __grid_constant__ GroupedArguments<RnnBackwardArrays<mode>> arrays,
             const int* counts, int T, int N, int H, int S, int passes, int reverse,
             int doutput_stride, Word max_polls, Word* report, Word tag) {
  const RnnBackwardArrays<mode> own = arrays.own();
  const RnnBackward<mode, relu> cell({own.doutput, doutput_stride, own.gates, own.exchange, H},
                                     own.states);
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  backward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, {own.dh}, sequence);
}

}  // namespace xprnn
