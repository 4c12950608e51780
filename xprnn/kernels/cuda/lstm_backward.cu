// The LSTM backward over a whole sequence in one launch: sequence.backward with LSTM.backward of
// cells/lstm.py. Stands behind lstm.h and backward.h.

namespace xprnn {

template <int kind>
struct LstmBackward : BackwardCell<kind, 4, 2> {
  typedef BackwardCell<kind, 4, 2> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<kind> i, f, g, o, tanh_c;
    float2 c;
  };
  const float* c;
  const Element* saved;

  XP_FN LstmBackward(const Base& base, const float* c_, const Element* saved_)
      : Base(base), c(c_), saved(saved_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index at) const {
    in.i = this->read(this->gate_of(at, 0));
    in.f = this->read(this->gate_of(at, 1));
    in.g = this->read(this->gate_of(at, 2));
    in.o = this->read(this->gate_of(at, 3));
    in.tanh_c = this->read(saved + at * this->H);
    in.c = this->read(c + before * this->H);
    Base::load(in, before, after, at);
  }
  XP_FN float2 step(const Inputs& in, Carried<2>::Row dstates, Index at) const {
    const float2 dh = dstates[0];
    float2& dc = dstates[1];
    float2 dgh[4], direct;
    dc.x = lstm_step_backward(dh.x + in.doutput.x, dc.x, in.i.x(), in.f.x(), in.g.x(), in.o.x(),
                              in.c.x, in.tanh_c.x(), dgh[0].x, dgh[1].x, dgh[2].x, dgh[3].x);
    dc.y = lstm_step_backward(dh.y + in.doutput.y, dc.y, in.i.y(), in.f.y(), in.g.y(), in.o.y(),
                              in.c.y, in.tanh_c.y(), dgh[0].y, dgh[1].y, dgh[2].y, dgh[3].y);
    this->put(dgh, at);
    direct.x = direct.y = 0;
    return direct;
  }
};

template <int kind>
struct LstmBackwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (4*H, H) read
  const float* c;            // (N + S, H) read
  const float* doutput;      // (S, H), rows `doutput_stride` apart, or null for zeros; read
  Element* gates;            // (S, 4*H) read as i f g o, then = dgh
  const Element* saved;      // (S, H) read as tanh(c)
  float* dh;                 // (N, H) read as of the final states, then = of the initial ones
  float* dc;                 // (N, H) likewise
  Word* mail;                // (S, 4, H padded) EMPTY, =
};

// The rest is in `Sequence`, as the forward pass had it; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles>
XP_KERNEL(32 * warps)
lstm_backward(const __grid_constant__ Beside<LstmBackwardArrays<kind>> arrays, const int* counts,
              int T, int N, int H, int S, int passes, int reverse, int doutput_stride, Word spins,
              Word* report, Word tag) {
  const LstmBackwardArrays<kind> own = arrays.here();
  const LstmBackward<kind> cell({own.doutput, doutput_stride, own.gates, own.mail, H},
                                own.c, own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  undo_steps<warps, chunks, held, tiles>(cell, own.weight_hh, {own.dh, own.dc}, sequence);
}

}  // namespace xprnn
