// The Elman cell forward over a whole sequence in one launch: sequence.forward with RNN.forward of
// cells/rnn.py. Stands behind rnn.h and forward.h. Where a call is recorded nothing more is kept.

namespace xprnn {

template <int kind, bool relu>
struct RnnForward : ForwardCell<kind, 1> {
  typedef ForwardCell<kind, 1> Base;
  typedef typename Base::Inputs Inputs;

  XP_FN explicit RnnForward(const Base& base) : Base(base) {}

  XP_FN void step(const Inputs& in, const float2 (&gh)[1], Index after, Index at) const {
    float2 h;
    h.x = rnn_step<relu>(in.gx[0].x(), gh[0].x);
    h.y = rnn_step<relu>(in.gx[0].y(), gh[0].y);
    this->put(h, after);
  }
};

template <int kind>
struct RnnForwardArrays {
  typedef typename Numbers<kind>::Element Element;
  const Element* weight_hh;  // (H, H) read
  Element* gates;            // (S, H) read: gx
  Element* states;           // (N + S, H) the initial rows read, others =
  Word* mail;                // (N + S, H padded) may be `states`; first rows read, others, EMPTY, =
  Below<kind> below;         // of a wave
};

// The rest is in `Sequence`; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles, bool relu>
XP_KERNEL(32 * warps)
rnn_forward(const __grid_constant__ Beside<RnnForwardArrays<kind>> arrays, const int* counts, int T,
            int N, int H, int S, int passes, int reverse, Word spins, Word* report, Word tag) {
  const RnnForwardArrays<kind> own = arrays.here();
  const RnnForward<kind, relu> cell({own.gates, own.states, own.mail, H});
  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  take_steps<warps, chunks, held, tiles>(cell, own.weight_hh, own.below, sequence);
}

}  // namespace xprnn
