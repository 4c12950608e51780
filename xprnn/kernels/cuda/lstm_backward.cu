// The LSTM backward over a whole sequence in one launch: StepLoop.backward with LSTM.backward of
// cells/lstm.py. Included after lstm.h and backward.h.

namespace xprnn {

template <int mode>
struct LstmBackward : BackwardCell<mode, 4, 2> {
  typedef BackwardCell<mode, 4, 2> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<mode> i, f, g, o, tanh_c;
    float2 c;
  };
  const float* c;
  const Element* saved;

  XP_FN LstmBackward(const Base& base, const float* c_, const Element* saved_)
      : Base(base), c(c_), saved(saved_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index row) const {
    in.i = this->read(this->gate_of(row, 0));
    in.f = this->read(this->gate_of(row, 1));
    in.g = this->read(this->gate_of(row, 2));
    in.o = this->read(this->gate_of(row, 3));
    in.tanh_c = this->read(saved + row * this->H);
    in.c = this->read(c + before * this->H);
    Base::load(in, before, after, row);
  }
  XP_FN float2 step(const Inputs& in, StateGradients<2>::Row dstates, Index row) const {
    const float2 dh = dstates[0];
    float2& dc = dstates[1];
    float2 dgh[4], direct;
    dc.x = lstm_step_backward(dh.x + in.doutput.x, dc.x, in.i.x(), in.f.x(), in.g.x(), in.o.x(),
                              in.c.x, in.tanh_c.x(), dgh[0].x, dgh[1].x, dgh[2].x, dgh[3].x);
    dc.y = lstm_step_backward(dh.y + in.doutput.y, dc.y, in.i.y(), in.f.y(), in.g.y(), in.o.y(),
                              in.c.y, in.tanh_c.y(), dgh[0].y, dgh[1].y, dgh[2].y, dgh[3].y);
    this->store(dgh, row);
    direct.x = direct.y = 0;
    return direct;
  }
};

template <int mode>
struct LstmBackwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (4*H, H)
  const float* c;            // in     (N + S, H)
  const float* doutput;      // in     (S, H), row stride `doutput_stride`; null for zeros
  Element* gates;            // inout  (S, 4*H): i f g o -> dgh
  const Element* saved;      // in     (S, H): tanh_c
  float* dh;                 // inout  (N, H): of the final states -> of the initial states
  float* dc;                 // inout  (N, H): likewise
  Word* exchange;            // inout  (S, 4, H padded): SENTINEL -> dgh
};

// The other parameters are those of `Sequence` in the forward pass; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles>
XP_KERNEL(32 * warps)
lstm_backward(const __grid_constant__ GroupedArguments<LstmBackwardArrays<mode>> arrays,
              const int* counts, int T, int N, int H, int S, int passes, int reverse,
              int doutput_stride, Word max_polls, Word* report, Word tag) {
  const LstmBackwardArrays<mode> own = arrays.own();
  const LstmBackward<mode> cell({own.doutput, doutput_stride, own.gates, own.exchange, H},
                                own.c, own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  backward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, {own.dh, own.dc},
                                                           sequence);
}

}  // namespace xprnn
