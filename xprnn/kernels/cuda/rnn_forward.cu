// The Elman cell forward over a whole sequence in one launch: StepLoop.forward with RNN.forward of
// cells/rnn.py. Included after rnn.h and forward.h. A recorded call saves nothing besides the
// states.

namespace xprnn {

template <int mode, bool relu>
struct RnnForward : ForwardCell<mode, 1> {
  typedef ForwardCell<mode, 1> Base;
  typedef typename Base::Inputs Inputs;

  XP_FN explicit RnnForward(const Base& base) : Base(base) {}

  XP_FN void step(const Inputs& in, const float2 (&gh)[1], Index after, Index row) const {
    float2 h_next;
    h_next.x = rnn_step<relu>(in.gx[0].x(), gh[0].x);
    h_next.y = rnn_step<relu>(in.gx[0].y(), gh[0].y);
    this->store(h_next, after);
  }
};

template <int mode>
struct RnnForwardArrays {
  typedef typename Operand<mode>::Element Element;
  const Element* weight_hh;  // in     (H, H)
  Element* gates;            // in     (S, H): gx
  Element* states;           // inout  (N + S, H): initial rows -> all rows
  Word* exchange;            // inout  (N + S, H padded): initial rows, then SENTINEL -> all rows;
                             //        may be `states`
  LowerLayer<mode> lower;    // in     of a wavefront
};

// The other parameters are those of `Sequence`; a pass has 8 * row_tiles rows.
template <int mode, int warps, int k_blocks, int in_registers, int row_tiles, bool relu>
XP_KERNEL(32 * warps)
rnn_forward(const __grid_constant__ GroupedArguments<RnnForwardArrays<mode>> arrays,
            const int* counts, int T, int N, int H, int S, int passes, int reverse, Word max_polls,
            Word* report, Word tag) {
  const RnnForwardArrays<mode> own = arrays.own();
  const RnnForward<mode, relu> cell({own.gates, own.states, own.exchange, H});
  const Sequence sequence = {counts, T, N, S, passes, reverse, max_polls, report, tag};
  forward_steps<warps, k_blocks, in_registers, row_tiles>(cell, own.weight_hh, own.lower, sequence);
}

}  // namespace xprnn
