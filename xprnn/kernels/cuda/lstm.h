// The LSTM cell. The equations are those of cells/lstm.py: LSTM.

namespace xprnn {

// Takes the four pre-activations, gives the gates, c' and tanh(c'), returns h'.
template <class A>
XP_FN A lstm_step(A a_i, A a_f, A a_g, A a_o, A c, A& i, A& f, A& g, A& o, A& c_next,
                  A& tanh_c) {
  i = sigmoid(a_i);
  f = sigmoid(a_f);
  g = tanh_of(a_g);
  o = sigmoid(a_o);
  c_next = f * c + i * g;
  tanh_c = tanh_of(c_next);
  return o * tanh_c;
}

// Inverts lstm_step; dgx = dgh = [di df dg do]; returns dc.
template <class A>
XP_FN A lstm_step_backward(A dh, A dc, A i, A f, A g, A o, A c, A tanh_c, A& di, A& df, A& dg,
                           A& d_o) {
  dc += dh * o * (1 - tanh_c * tanh_c);
  d_o = dh * tanh_c * o * (1 - o);
  dg = dc * i * (1 - g * g);
  di = dc * g * i * (1 - i);
  df = dc * c * f * (1 - f);
  return dc * f;
}

// LSTM.forward_gates. gh (N, 4*H) and c (N, H) are read; gates (N, 4*H) is read as gx,
// then = i f g o; saved (N, H) = tanh(c'); h_next (N, H) =; c_next (N, H) =
template <class T, class A>
XP_FN void lstm_forward_gates(Index i, Index H, const A* gh, const A* c, T* gates, T* saved,
                              T* h_next, A* c_next) {
  const Index at = in_blocks(i, H, 4);
  gates += at;
  gh += at;
  A input, forget, cell, output, tanh_c;
  const A h = lstm_step(static_cast<A>(gates[0]) + gh[0], static_cast<A>(gates[H]) + gh[H],
                        static_cast<A>(gates[2 * H]) + gh[2 * H],
                        static_cast<A>(gates[3 * H]) + gh[3 * H], c[i], input, forget, cell,
                        output, c_next[i], tanh_c);
  gates[0] = static_cast<T>(input);
  gates[H] = static_cast<T>(forget);
  gates[2 * H] = static_cast<T>(cell);
  gates[3 * H] = static_cast<T>(output);
  saved[i] = static_cast<T>(tanh_c);
  h_next[i] = static_cast<T>(h);
}

// LSTM.backward_gates. saved (N, H), c (N, H) and dh (N, H), of the step after, are read;
// gates (N, 4*H) is read as i f g o, then = dgh; dc (N, H) is read as dc', then = dc
template <class T, class A>
XP_FN void lstm_backward_gates(Index i, Index H, const T* saved, const A* c, const A* dh,
                               T* gates, A* dc) {
  gates += in_blocks(i, H, 4);
  A d_input, d_forget, d_cell, d_output;
  dc[i] = lstm_step_backward(dh[i], dc[i], static_cast<A>(gates[0]), static_cast<A>(gates[H]),
                             static_cast<A>(gates[2 * H]), static_cast<A>(gates[3 * H]), c[i],
                             static_cast<A>(saved[i]), d_input, d_forget, d_cell, d_output);
  gates[0] = static_cast<T>(d_input);
  gates[H] = static_cast<T>(d_forget);
  gates[2 * H] = static_cast<T>(d_cell);
  gates[3 * H] = static_cast<T>(d_output);
}

}  // namespace xprnn
