// The GRU, reset after the product, backward over a whole sequence in one launch:
// sequence.backward with GRU.backward of cells/gru.py. Stands behind gru.h and backward.h.

namespace xprnn {

template <int kind>
struct GruBackward : BackwardCell<kind, 3> {
  typedef BackwardCell<kind, 3> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<kind> r, z, n, gh_n, h;
  };
  const Element* states;
  Element* saved;

  XP_FN GruBackward(const Base& base, const Element* states_, Element* saved_)
      : Base(base), states(states_), saved(saved_) {}

  XP_FN void load(Inputs& in, Index before, Index after, Index at) const {
    in.r = this->read(this->gate_of(at, 0));
    in.z = this->read(this->gate_of(at, 1));
    in.n = this->read(this->gate_of(at, 2));
    in.gh_n = this->read(saved + at * this->H);
    in.h = this->read(states + before * this->H);
    Base::load(in, before, after, at);
  }
  XP_FN float2 step(const Inputs& in, Carried<1>::Row dstates, Index at) const {
    const float2 dh = dstates[0];
    float2 dgh[3], dgx_n, direct;
    direct.x = gru_step_backward(dh.x + in.doutput.x, in.r.x(), in.z.x(), in.n.x(), in.gh_n.x(),
                                 in.h.x(), dgh[0].x, dgh[1].x, dgx_n.x, dgh[2].x);
    direct.y = gru_step_backward(dh.y + in.doutput.y, in.r.y(), in.z.y(), in.n.y(), in.gh_n.y(),
                                 in.h.y(), dgh[0].y, dgh[1].y, dgx_n.y, dgh[2].y);
    this->put(dgh, at);
    if (this->u < this->H) this->write(saved + at * this->H, dgx_n);
    return direct;
  }
  XP_FN void spoil(Index at) const {
    Base::spoil(at);
    if (this->u < this->H) this->write(saved + at * this->H, not_a_number());
  }
};

template <int kind>
struct GruBackwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (3*H, H) read
  const Element* states;     // (N + S, H) read
  const float* doutput;      // (S, H), rows `doutput_stride` apart, or null for zeros; read
  Element* gates;            // (S, 3*H) read as r z n, then = dgh
  Element* saved;            // (S, H) read as gh_n, then = dgx_n
  float* dh;                 // (N, H) read as of the final states, then = of the initial ones
  Word* mail;                // (S, 3, H padded) EMPTY, =
};

// The rest is in `Sequence`, as the forward pass had it; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles>
XP_KERNEL(32 * warps)
gru_backward(const __grid_constant__ Beside<GruBackwardArrays<kind>> arrays, const int* counts, int T,
             int N, int H, int S, int passes, int reverse, int doutput_stride, Word spins,
             Word* report, Word tag) {
  const GruBackwardArrays<kind> own = arrays.here();
  const GruBackward<kind> cell({own.doutput, doutput_stride, own.gates, own.mail, H},
                               own.states, own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  undo_steps<warps, chunks, held, tiles>(cell, own.weight_hh, {own.dh}, sequence);
}

}  // namespace xprnn
