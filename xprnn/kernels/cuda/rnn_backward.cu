// The Elman cell backward over a whole sequence in one launch: sequence.backward with RNN.backward
// of cells/rnn.py. Stands behind rnn.h and backward.h.

namespace xprnn {

template <int kind, bool relu>
struct RnnBackward : BackwardCell<kind, 1> {
  typedef BackwardCell<kind, 1> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<kind> h_next;
  };
  const Element* states;

  XP_FN RnnBackward(const Base& base, const Element* states_) : Base(base), states(states_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index at) const {
    in.h_next = this->read(states + after * this->H);
    Base::load(in, before, after, at);
  }
  XP_FN float2 step(const Inputs& in, Carried<1>::Row dstates, Index at) const {
    const float2 dh = dstates[0];
    float2 dgh[1], direct;
    dgh[0].x = rnn_step_backward<relu>(dh.x + in.doutput.x, in.h_next.x());
    dgh[0].y = rnn_step_backward<relu>(dh.y + in.doutput.y, in.h_next.y());
    this->put(dgh, at);
    direct.x = direct.y = 0;
    return direct;
  }
};

template <int kind>
struct RnnBackwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (H, H) read
  const Element* states;     // (N + S, H) read
  const float* doutput;      // (S, H), rows `doutput_stride` apart, or null for zeros; read
  Element* gates;            // (S, H) = dgh
  float* dh;                 // (N, H) read as of the final states, then = of the initial ones
  Word* mail;                // (S, H padded) EMPTY, =
};

// The rest is in `Sequence`, as the forward pass had it; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles, bool relu>
XP_KERNEL(32 * warps)
rnn_backward(const __grid_constant__ Beside<RnnBackwardArrays<kind>> arrays, const int* counts, int T,
             int N, int H, int S, int passes, int reverse, int doutput_stride, Word spins,
             Word* report, Word tag) {
  const RnnBackwardArrays<kind> own = arrays.here();
  const RnnBackward<kind, relu> cell({own.doutput, doutput_stride, own.gates, own.mail, H},
                                     own.states);
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  undo_steps<warps, chunks, held, tiles>(cell, own.weight_hh, {own.dh}, sequence);
}

}  // namespace xprnn
