// The LSTM forward over a whole sequence in one launch: StepLoop.forward with LSTM.forward of
// cells/lstm.py. Included after lstm.h and forward.h. c is passed from step to step in its array:
// an element is read only by the thread that wrote it.

namespace xprnn {

template <int mode, bool record>
struct LstmForward : ForwardCell<mode, 4> {
  typedef ForwardCell<mode, 4> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    float2 c;
  };
  Element* saved;
  float* c;

  XP_FN LstmForward(const Base& base, Element* saved_, float* c_)
      : Base(base), saved(saved_), c(c_) {}

  XP_FN void load(Inputs& in, Index before, Index row) const {
    in.c.x = in.c.y = 0;
    if (this->u < this->H) in.c = this->read(c + before * this->H);
    Base::load(in, before, row);
  }
  XP_FN void step(const Inputs& in, const float2 (&gh)[4], Index after, Index row) const {
    float2 i, f, g, o, c_next, tanh_c, h_next;
    h_next.x = lstm_step(in.gx[0].x() + gh[0].x, in.gx[1].x() + gh[1].x, in.gx[2].x() + gh[2].x,
                         in.gx[3].x() + gh[3].x, in.c.x, i.x, f.x, g.x, o.x, c_next.x, tanh_c.x);
    h_next.y = lstm_step(in.gx[0].y() + gh[0].y, in.gx[1].y() + gh[1].y, in.gx[2].y() + gh[2].y,
                         in.gx[3].y() + gh[3].y, in.c.y, i.y, f.y, g.y, o.y, c_next.y, tanh_c.y);
    this->store(h_next, after);
    if (this->u >= this->H) return;
    this->write(c + after * this->H, c_next);
    if (record) {
      this->write(this->gate_of(row, 0), i);
      this->write(this->gate_of(row, 1), f);
      this->write(this->gate_of(row, 2), g);
      this->write(this->gate_of(row, 3), o);
      this->write(saved + row * this->H, tanh_c);
    }
  }
  XP_FN void poison(Index after) const {
    Base::poison(after);
    if (this->u < this->H) this->write(c + after * this->H, nan_pair());
  }
};

template <int mode>
struct LstmForwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (4*H, H)
  Element* gates;            // inout  (S, 4*H): gx, with `record` -> i f g o
  Element* saved;            // out    (S, H): tanh_c; unused without `record`
  Element* states;           // inout  (N + S, H): initial rows -> all rows
  float* c;                  // inout  (N + S, H): initial rows -> all rows
  Word* exchange;            // inout  (N + S, H padded): initial rows, then SENTINEL -> all rows;
                             //        may be `states`
  LowerLayer<mode> lower;    // in     of a wavefront
};

// The other parameters are those of `Sequence`; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles, bool record>
XP_KERNEL(32 * warps)
lstm_forward(const __grid_constant__ GroupedArguments<LstmForwardArrays<mode>> arrays,
             const int* counts, int T, int N, int H, int S, int passes, int reverse, Word max_polls,
             Word* report, Word tag) {
  const LstmForwardArrays<mode> own = arrays.own();
  const LstmForward<mode, record> cell({own.gates, own.states, own.exchange, H}, own.saved, own.c);
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  forward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, own.lower, sequence);
}

}  // namespace xprnn
