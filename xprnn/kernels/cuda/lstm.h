// The LSTM cell. The equations, names and order of statements are those of cells/lstm.py.

namespace xprnn {

// From the four pre-activations to the gates, c_next and tanh_c = tanh(c_next); returns h_next.
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

// Backward of lstm_step; dgx = dgh = [di df dg do], where do is spelled d_o. Returns dc.
template <class A>
XP_FN A lstm_step_backward(A dh_next, A dc_next, A i, A f, A g, A o, A c, A tanh_c, A& di, A& df,
                           A& dg, A& d_o) {
  dc_next += dh_next * o * (1 - tanh_c * tanh_c);
  d_o = dh_next * tanh_c * o * (1 - o);
  dg = dc_next * i * (1 - g * g);
  di = dc_next * g * i * (1 - i);
  df = dc_next * c * f * (1 - f);
  return dc_next * f;
}

// LSTM.forward_gates
template <class C, class A>
XP_FN void lstm_forward_gates(Index idx, Index H,
                              const A* gh,   // in     (N, 4*H)
                              const A* c,    // in     (N, H)
                              C* gates,      // inout  (N, 4*H): gx -> i f g o
                              C* saved,      // out    (N, H): tanh_c
                              C* h_next,     // out    (N, H)
                              A* c_next) {   // out    (N, H)
  const Index at = gate_offset(idx, H, 4);
  gates += at;
  gh += at;
  A i, f, g, o, tanh_c;
  const A next = lstm_step(static_cast<A>(gates[0]) + gh[0], static_cast<A>(gates[H]) + gh[H],
                           static_cast<A>(gates[2 * H]) + gh[2 * H],
                           static_cast<A>(gates[3 * H]) + gh[3 * H], c[idx], i, f, g, o,
                           c_next[idx], tanh_c);
  gates[0] = static_cast<C>(i);
  gates[H] = static_cast<C>(f);
  gates[2 * H] = static_cast<C>(g);
  gates[3 * H] = static_cast<C>(o);
  saved[idx] = static_cast<C>(tanh_c);
  h_next[idx] = static_cast<C>(next);
}

// LSTM.backward_gates
template <class C, class A>
XP_FN void lstm_backward_gates(Index idx, Index H,
                               const C* saved,  // in     (N, H): tanh_c
                               const A* c,      // in     (N, H)
                               const A* dh,     // in     (N, H): dh_next
                               C* gates,        // inout  (N, 4*H): i f g o -> dgh
                               A* dc) {         // inout  (N, H): dc_next -> dc
  gates += gate_offset(idx, H, 4);
  A di, df, dg, d_o;
  dc[idx] = lstm_step_backward(dh[idx], dc[idx], static_cast<A>(gates[0]),
                               static_cast<A>(gates[H]), static_cast<A>(gates[2 * H]),
                               static_cast<A>(gates[3 * H]), c[idx], static_cast<A>(saved[idx]),
                               di, df, dg, d_o);
  gates[0] = static_cast<C>(di);
  gates[H] = static_cast<C>(df);
  gates[2 * H] = static_cast<C>(dg);
  gates[3 * H] = static_cast<C>(d_o);
}

}  // namespace xprnn
