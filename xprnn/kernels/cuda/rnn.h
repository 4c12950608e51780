// The Elman cell. The equations are those of cells/rnn.py: RNN("tanh") and RNN("relu").

namespace xprnn {

// h' = tanh(gx + gh)   or   max(gx + gh, 0)
template <bool relu, class A>
XP_FN A rnn_step(A gx, A gh) {
  const A a = gx + gh;
  if (relu) return a < 0 ? A(0) : a;  // a NaN stays
  return tanh_of(a);
}

// da = dh' (1 - h'^2)   or   dh' [h' > 0]
template <bool relu, class A>
XP_FN A rnn_step_backward(A dh, A h_next) {
  if (relu) return dh * (h_next > 0 ? A(1) : h_next);  // 0 or NaN: h' is not negative
  return dh * (1 - h_next * h_next);
}

// RNN.forward_gates. gates (N, H), which is gx, and gh (N, H) are read; h_next (N, H) =
template <bool relu, class T, class A>
XP_FN void rnn_forward_gates(Index i, const T* gates, const A* gh, T* h_next) {
  h_next[i] = static_cast<T>(rnn_step<relu>(static_cast<A>(gates[i]), gh[i]));
}

// RNN.backward_gates. h_next (N, H) and dh (N, H), of the step after, are read; gates (N, H) = da
template <bool relu, class T, class A>
XP_FN void rnn_backward_gates(Index i, const T* h_next, const A* dh, T* gates) {
  gates[i] = static_cast<T>(rnn_step_backward<relu>(dh[i], static_cast<A>(h_next[i])));
}

}  // namespace xprnn
