// The Elman cell. The equations are those of cells/rnn.py: RNN("tanh") and RNN("relu").

namespace xprnn {

// h_next = tanh(gx + gh)   or   max(gx + gh, 0)
template <bool relu, class A>
XP_FN A rnn_step(A gx, A gh) {
  const A a = gx + gh;
  if (relu) return a < 0 ? A(0) : a;  // a NaN is kept
  return tanh_of(a);
}

// da = dh_next (1 - h_next^2)   or   dh_next [h_next > 0]
template <bool relu, class A>
XP_FN A rnn_step_backward(A dh_next, A h_next) {
  if (relu) return dh_next * (h_next > 0 ? A(1) : h_next);  // 0 or NaN
  return dh_next * (1 - h_next * h_next);
}

// RNN.forward_gates
template <bool relu, class C, class A>
XP_FN void rnn_forward_gates(Index idx,
                             const C* gates,  // in     (N, H): gx
                             const A* gh,     // in     (N, H)
                             C* h_next) {     // out    (N, H)
  h_next[idx] = static_cast<C>(rnn_step<relu>(static_cast<A>(gates[idx]), gh[idx]));
}

// RNN.backward_gates
template <bool relu, class C, class A>
XP_FN void rnn_backward_gates(Index idx,
                              const C* h_next,  // in     (N, H)
                              const A* dh,      // in     (N, H): dh_next
                              C* gates) {       // out    (N, H): da
  gates[idx] = static_cast<C>(rnn_step_backward<relu>(dh[idx], static_cast<A>(h_next[idx])));
}

}  // namespace xprnn
