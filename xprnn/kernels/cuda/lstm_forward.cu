// The LSTM forward over a whole sequence in one launch: sequence.forward with LSTM.forward of
// cells/lstm.py. Stands behind lstm.h and forward.h. c goes from step to step through its array:
// the thread that wrote it reads it, no other one does.

namespace xprnn {

template <int kind, bool record>
struct LstmForward : ForwardCell<kind, 4> {
  typedef ForwardCell<kind, 4> Base;
  typedef typename Base::Element Element;
  struct Inputs : Base::Inputs {
    float2 c;
  };
  Element* saved;
  float* c;

  XP_FN LstmForward(const Base& base, Element* saved_, float* c_)
      : Base(base), saved(saved_), c(c_) {}

  XP_FN void load(Inputs& in, Index before, Index at) const {
    in.c.x = in.c.y = 0;
    if (this->u < this->H) in.c = this->read(c + before * this->H);
    Base::load(in, before, at);
  }
  XP_FN void step(const Inputs& in, const float2 (&gh)[4], Index after, Index at) const {
    float2 i, f, g, o, c_next, tanh_c, h;
    h.x = lstm_step(in.gx[0].x() + gh[0].x, in.gx[1].x() + gh[1].x, in.gx[2].x() + gh[2].x,
                    in.gx[3].x() + gh[3].x, in.c.x, i.x, f.x, g.x, o.x, c_next.x, tanh_c.x);
    h.y = lstm_step(in.gx[0].y() + gh[0].y, in.gx[1].y() + gh[1].y, in.gx[2].y() + gh[2].y,
                    in.gx[3].y() + gh[3].y, in.c.y, i.y, f.y, g.y, o.y, c_next.y, tanh_c.y);
    this->put(h, after);
    if (this->u >= this->H) return;
    this->write(c + after * this->H, c_next);
    if (record) {
      this->write(this->gate_of(at, 0), i);
      this->write(this->gate_of(at, 1), f);
      this->write(this->gate_of(at, 2), g);
      this->write(this->gate_of(at, 3), o);
      this->write(saved + at * this->H, tanh_c);
    }
  }
  XP_FN void spoil(Index after) const {
    Base::spoil(after);
    if (this->u < this->H) this->write(c + after * this->H, not_a_number());
  }
};

template <int kind>
struct LstmForwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (4*H, H) read
  Element* gates;            // (S, 4*H) read as gx; with `record` then = i f g o
  Element* saved;            // (S, H) with `record` = tanh(c), else not touched
  Element* states;           // (N + S, H) the initial rows read, others =
  float* c;                  // (N + S, H) the initial rows read, others =
  Word* mail;                // (N + S, H padded) may be `states`; first rows read, others, EMPTY, =
  Below<kind> below;         // of a wave
};

// The rest is in `Sequence`; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles, bool record>
XP_KERNEL(32 * warps)
lstm_forward(const __grid_constant__ Beside<LstmForwardArrays<kind>> arrays, const int* counts, int T,
             int N, int H, int S, int passes, int reverse, Word spins, Word* report, Word tag) {
  const LstmForwardArrays<kind> own = arrays.here();
  const LstmForward<kind, record> cell({own.gates, own.states, own.mail, H}, own.saved, own.c);
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  take_steps<warps, chunks, held, tiles>(cell, own.weight_hh, own.below, sequence);
}

}  // namespace xprnn
