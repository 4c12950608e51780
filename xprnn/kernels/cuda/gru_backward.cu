// The GRU, reset after the product, backward over a whole sequence in one launch:
// StepLoop.backward with GRU.backward of cells/gru.py. Included after gru.h and backward.h.

namespace xprnn {

template <int mode>
struct GruBackward : BackwardCell<mode, 3> {
  typedef BackwardCell<mode, 3> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<mode> r, z, n, gh_n, h;
  };
  const Element* states;
  Element* saved;

  XP_FN GruBackward(const Base& base, const Element* states_, Element* saved_)
      : Base(base), states(states_), saved(saved_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index row) const {
    in.r = this->read(this->gate_of(row, 0));
    in.z = this->read(this->gate_of(row, 1));
    in.n = this->read(this->gate_of(row, 2));
    in.gh_n = this->read(saved + row * this->H);
    in.h = this->read(states + before * this->H);
    Base::load(in, before, after, row);
  }
  XP_FN float2 step(const Inputs& in, StateGradients<1>::Row dstates, Index row) const {
    const float2 dh = dstates[0];
    float2 dgh[3], dgx_n, direct;
    direct.x = gru_step_backward(dh.x + in.doutput.x, in.r.x(), in.z.x(), in.n.x(), in.gh_n.x(),
                                 in.h.x(), dgh[0].x, dgh[1].x, dgx_n.x, dgh[2].x);
    direct.y = gru_step_backward(dh.y + in.doutput.y, in.r.y(), in.z.y(), in.n.y(), in.gh_n.y(),
                                 in.h.y(), dgh[0].y, dgh[1].y, dgx_n.y, dgh[2].y);
    this->store(dgh, row);
    if (this->u < this->H) this->write(saved + row * this->H, dgx_n);
    return direct;
  }
  XP_FN void poison(Index row) const {
    Base::poison(row);
    if (this->u < this->H) this->write(saved + row * this->H, nan_pair());
  }
};

template <int mode>
struct GruBackwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (3*H, H)
  const Element* states;     // in     (N + S, H)
  const float* doutput;      // in     (S, H), row stride `doutput_stride`; null for zeros
  Element* gates;            // inout  (S, 3*H): r z n -> dgh
  Element* saved;            // inout  (S, H): gh_n -> dgx_n
  float* dh;                 // inout  (N, H): of the final states -> of the initial states
  Word* exchange;            // inout  (S, 3, H padded): SENTINEL -> dgh
};

// The other parameters are those of `Sequence` in the forward pass; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles>
XP_KERNEL(32 * warps)
gru_backward(const __grid_constant__ GroupedArguments<GruBackwardArrays<mode>> arrays,
             const int* counts, int T, int N, int H, int S, int passes, int reverse,
             int doutput_stride, Word max_polls, Word* report, Word tag) {
  const GruBackwardArrays<mode> own = arrays.own();
  const GruBackward<mode> cell({own.doutput, doutput_stride, own.gates, own.exchange, H},
                               own.states, own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  backward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, {own.dh}, sequence);
}

}  // namespace xprnn
