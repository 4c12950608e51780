// The Elman cell. The equations are those of cells/rnn.py: RNN("tanh") and RNN("relu").

namespace xprnn {

// h' = tanh(gx + gh)   or   max(gx + gh, 0)
template <bool relu, class A>
XP_FN A rnn_step(A gx, A gh) {
  const A a = gx + gh;
  if (relu) return a < 0 ? A(0) : a;  // a NaN is kept
  return tanh_of(a);
}

// da = dh' (1 - h'^2)   or   dh' [h' > 0]
template <bool relu, class A>
XP_FN A rnn_step_backward(A dh, A h_next) {
  if (relu) return dh * (h_next > 0 ? A(1) : h_next);  // h_next is 0 or NaN here
  return dh * (1 - h_next * h_next);
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
                              const A* dh,      // in     (N, H): gradient of h_next
                              C* gates) {       // out    (N, H): da
  gates[idx] = static_cast<C>(rnn_step_backward<relu>(dh[idx], static_cast<A>(h_next[idx])));
}

}  // namespace xprnn
