// The GRU, reset after the product, forward over a whole sequence in one launch: StepLoop.forward
// with GRU.forward of cells/gru.py. Included after gru.h and forward.h.

namespace xprnn {

template <int mode, bool record>
struct GruForward : ForwardCell<mode, 3> {
  typedef ForwardCell<mode, 3> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<mode> h;
  };
  Element* saved;
  float2 bias;  // b_hh of n

  XP_FN GruForward(const Base& base, const float* bias_hh, Element* saved_)
      : Base(base), saved(saved_) {
    bias.x = bias.y = 0;
    if (bias_hh && this->u < this->H) bias = this->read(bias_hh + 2 * this->H);
  }
  XP_FN void load(Inputs& in, Index before, Index row) const {
    // written by this thread, or an initial state
    in.h = poll_pair<mode>(this->exchange + before * this->words + this->u_word);
    Base::load(in, before, row);
  }
  XP_FN void step(const Inputs& in, const float2 (&gh)[3], Index after, Index row) const {
    float2 r, z, n, h_next, gh_n;
    gh_n.x = gh[2].x + bias.x;
    gh_n.y = gh[2].y + bias.y;
    h_next.x = gru_step(in.gx[0].x(), in.gx[1].x(), in.gx[2].x(), gh[0].x, gh[1].x, gh_n.x,
                        in.h.x(), r.x, z.x, n.x);
    h_next.y = gru_step(in.gx[0].y(), in.gx[1].y(), in.gx[2].y(), gh[0].y, gh[1].y, gh_n.y,
                        in.h.y(), r.y, z.y, n.y);
    this->store(h_next, after);
    if (record && this->u < this->H) {
      this->write(this->gate_of(row, 0), r);
      this->write(this->gate_of(row, 1), z);
      this->write(this->gate_of(row, 2), n);
      this->write(saved + row * this->H, gh_n);
    }
  }
};

template <int mode>
struct GruForwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (3*H, H)
  const float* bias_hh;      // in     (3*H,): only n's part; or null
  Element* gates;            // inout  (S, 3*H): gx, with `record` -> r z n
  Element* saved;            // out    (S, H): gh_n; unused without `record`
  Element* states;           // inout  (N + S, H): initial rows -> all rows
  Word* exchange;            // inout  (N + S, H padded): initial rows, then SENTINEL -> all rows;
                             //        may be `states`
  LowerLayer<mode> lower;    // in     of a wavefront
};

// The other parameters are those of `Sequence`; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles, bool record>
XP_KERNEL(32 * warps)
gru_forward(const __grid_constant__ GroupedArguments<GruForwardArrays<mode>> arrays,
            const int* counts, int T, int N, int H, int S, int passes, int reverse, Word max_polls,
            Word* report, Word tag) {
  const GruForwardArrays<mode> own = arrays.own();
  const GruForward<mode, record> cell({own.gates, own.states, own.exchange, H}, own.bias_hh,
                                      own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  forward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, own.lower, sequence);
}

}  // namespace xprnn
