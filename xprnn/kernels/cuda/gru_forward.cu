// The GRU, reset after the product, forward over a whole sequence in one launch: sequence.forward
// with GRU.forward of cells/gru.py. Stands behind gru.h and forward.h.

namespace xprnn {

template <int kind, bool record>
struct GruForward : ForwardCell<kind, 3> {
  typedef ForwardCell<kind, 3> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    Pair<kind> h;
  };
  Element* saved;
  float2 bias;  // of n

  XP_FN GruForward(const Base& base, const float* bias_hh, Element* saved_)
      : Base(base), saved(saved_) {
    bias.x = bias.y = 0;
    if (bias_hh && this->u < this->H) bias = this->read(bias_hh + 2 * this->H);
  }
  XP_FN void load(Inputs& in, Index before, Index at) const {
    in.h = poll_pair<kind>(this->mail + before * this->words + this->u_word);  // own, or initial
    Base::load(in, before, at);
  }
  XP_FN void step(const Inputs& in, const float2 (&gh)[3], Index after, Index at) const {
    float2 r, z, n, h, gh_n;
    gh_n.x = gh[2].x + bias.x;
    gh_n.y = gh[2].y + bias.y;
    h.x = gru_step(in.gx[0].x(), in.gx[1].x(), in.gx[2].x(), gh[0].x, gh[1].x, gh_n.x,
                   in.h.x(), r.x, z.x, n.x);
    h.y = gru_step(in.gx[0].y(), in.gx[1].y(), in.gx[2].y(), gh[0].y, gh[1].y, gh_n.y,
                   in.h.y(), r.y, z.y, n.y);
    this->put(h, after);
    if (record && this->u < this->H) {
      this->write(this->gate_of(at, 0), r);
      this->write(this->gate_of(at, 1), z);
      this->write(this->gate_of(at, 2), n);
      this->write(saved + at * this->H, gh_n);
    }
  }
};

template <int kind>
struct GruForwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (3*H, H) read
  const float* bias_hh;      // (3*H,) or null: n's part is read
  Element* gates;            // (S, 3*H) read as gx; with `record` then = r z n
  Element* saved;            // (S, H) with `record` = gh_n, else not touched
  Element* states;           // (N + S, H) the initial rows read, others =
  Word* mail;                // (N + S, H padded) may be `states`; first rows read, others, EMPTY, =
  Below<kind> below;         // of a wave
};

// The rest is in `Sequence`; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles, bool record>
XP_KERNEL(32 * warps)
gru_forward(const __grid_constant__ Beside<GruForwardArrays<kind>> arrays, const int* counts, int T,
            int N, int H, int S, int passes, int reverse, Word spins, Word* report, Word tag) {
  const GruForwardArrays<kind> own = arrays.here();
  const GruForward<kind, record> cell({own.gates, own.states, own.mail, H}, own.bias_hh, own.saved);
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  take_steps<warps, chunks, held, tiles>(cell, own.weight_hh, own.below, sequence);
}

}  // namespace xprnn
