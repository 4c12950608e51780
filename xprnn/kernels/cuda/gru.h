// Both forms of the GRU cell. The equations, names and order of statements are those of
// cells/gru.py.

namespace xprnn {

// h_next = n + z (h - n)
template <class A>
XP_FN A gru_update(A z, A n, A h) {
  return n + z * (h - n);
}

// Backward of gru_update and of the activations of z and n. Returns dh_next z, the part of dh that
// does not go through the recurrent product.
template <class A>
XP_FN A gru_update_backward(A dh_next, A z, A n, A h, A& dgx_z, A& dgx_n) {
  const A dn = dh_next * (1 - z);
  dgx_n = dn * (1 - n * n);
  dgx_z = dn * (h - n) * z;
  return dh_next * z;
}

// GRU: from gx and gh to the gates; returns h_next.
template <class A>
XP_FN A gru_step(A gx_r, A gx_z, A gx_n, A gh_r, A gh_z, A gh_n, A h, A& r, A& z, A& n) {
  r = sigmoid(gx_r + gh_r);
  z = sigmoid(gx_z + gh_z);
  n = tanh_of(gx_n + r * gh_n);
  return gru_update(z, n, h);
}

// Backward of gru_step; dgh = [dgx_r dgx_z dgh_n]. Returns dh_next z, as gru_update_backward.
template <class A>
XP_FN A gru_step_backward(A dh_next, A r, A z, A n, A gh_n, A h, A& dgx_r, A& dgx_z, A& dgx_n,
                          A& dgh_n) {
  const A dh = gru_update_backward(dh_next, z, n, h, dgx_z, dgx_n);
  const A dr = dgx_n * gh_n;
  dgx_r = dr * r * (1 - r);
  dgh_n = dgx_n * r;
  return dh;
}

// GRUResetBefore: the gates r and z; returns q = r h, the operand of the product for n.
template <class A>
XP_FN A gru_reset(A gx_r, A gx_z, A gh_r, A gh_z, A h, A& r, A& z) {
  r = sigmoid(gx_r + gh_r);
  z = sigmoid(gx_z + gh_z);
  return r * h;
}

// GRUResetBefore: the candidate n from the product of q; returns h_next.
template <class A>
XP_FN A gru_candidate(A gx_n, A gh_n, A z, A h, A& n) {
  n = tanh_of(gx_n + gh_n);
  return gru_update(z, n, h);
}

// Backward of q = r h and of the activation of r. Returns dq r, the part of dh through q.
template <class A>
XP_FN A gru_reset_backward(A dq, A r, A h, A& dgx_r) {
  dgx_r = dq * h * r * (1 - r);
  return dq * r;
}

// GRU.forward_gates
template <class C, class A>
XP_FN void gru_forward_gates(Index idx, Index H,
                             const A* gh,       // in     (N, 3*H)
                             const C* h,        // in     (N, H)
                             const A* bias_hh,  // in     (3*H,): only n's part; or null
                             C* gates,          // inout  (N, 3*H): gx -> r z n
                             C* saved,          // out    (N, H): gh_n
                             C* h_next) {       // out    (N, H)
  const Index at = gate_offset(idx, H, 3);
  gates += at;
  gh += at;
  A gh_n = gh[2 * H];
  if (bias_hh) gh_n += bias_hh[2 * H + idx - row_of(idx, H) * H];  // gx has b_hh of r and z
  A r, z, n;
  const A next = gru_step(static_cast<A>(gates[0]), static_cast<A>(gates[H]),
                          static_cast<A>(gates[2 * H]), gh[0], gh[H], gh_n,
                          static_cast<A>(h[idx]), r, z, n);
  gates[0] = static_cast<C>(r);
  gates[H] = static_cast<C>(z);
  gates[2 * H] = static_cast<C>(n);
  saved[idx] = static_cast<C>(gh_n);
  h_next[idx] = static_cast<C>(next);
}

// GRU.backward_gates
template <class C, class A>
XP_FN void gru_backward_gates(Index idx, Index H,
                              const C* h,  // in     (N, H)
                              C* gates,    // inout  (N, 3*H): r z n -> dgh
                              C* saved,    // inout  (N, H): gh_n -> dgx_n
                              A* dh) {     // inout  (N, H): dh_next -> dh_next z
  gates += gate_offset(idx, H, 3);
  A dgx_r, dgx_z, dgx_n, dgh_n;
  dh[idx] = gru_step_backward(dh[idx], static_cast<A>(gates[0]), static_cast<A>(gates[H]),
                              static_cast<A>(gates[2 * H]), static_cast<A>(saved[idx]),
                              static_cast<A>(h[idx]), dgx_r, dgx_z, dgx_n, dgh_n);
  gates[0] = static_cast<C>(dgx_r);
  gates[H] = static_cast<C>(dgx_z);
  gates[2 * H] = static_cast<C>(dgh_n);
  saved[idx] = static_cast<C>(dgx_n);
}

// GRUResetBefore.forward_reset
template <class C, class A>
XP_FN void gru_forward_reset(Index idx, Index H,
                             const A* gh_rz,  // in     (N, 2*H)
                             const C* h,      // in     (N, H)
                             C* gates,        // inout  (N, 3*H): gx -> r z; n's part unused
                             C* saved) {      // out    (N, H): q
  gates += gate_offset(idx, H, 3);
  gh_rz += gate_offset(idx, H, 2);
  A r, z;
  const A q = gru_reset(static_cast<A>(gates[0]), static_cast<A>(gates[H]), gh_rz[0], gh_rz[H],
                        static_cast<A>(h[idx]), r, z);
  gates[0] = static_cast<C>(r);
  gates[H] = static_cast<C>(z);
  saved[idx] = static_cast<C>(q);
}

// GRUResetBefore.forward_candidate
template <class C, class A>
XP_FN void gru_forward_candidate(Index idx, Index H,
                                 const A* gh_n,  // in     (N, H)
                                 const C* h,     // in     (N, H)
                                 C* gates,       // inout  (N, 3*H): z is read, gx -> n
                                 C* h_next) {    // out    (N, H)
  gates += gate_offset(idx, H, 3);
  A n;
  const A next = gru_candidate(static_cast<A>(gates[2 * H]), gh_n[idx], static_cast<A>(gates[H]),
                               static_cast<A>(h[idx]), n);
  gates[2 * H] = static_cast<C>(n);
  h_next[idx] = static_cast<C>(next);
}

// GRUResetBefore.backward_candidate
template <class C, class A>
XP_FN void gru_backward_candidate(Index idx, Index H,
                                  const C* h,  // in     (N, H)
                                  C* gates,    // inout  (N, 3*H): z n -> dgx_z dgx_n
                                  A* dh) {     // inout  (N, H): dh_next -> dh_next z
  gates += gate_offset(idx, H, 3);
  A dgx_z, dgx_n;
  dh[idx] = gru_update_backward(dh[idx], static_cast<A>(gates[H]), static_cast<A>(gates[2 * H]),
                                static_cast<A>(h[idx]), dgx_z, dgx_n);
  gates[H] = static_cast<C>(dgx_z);
  gates[2 * H] = static_cast<C>(dgx_n);
}

// GRUResetBefore.backward_reset
template <class C, class A>
XP_FN void gru_backward_reset(Index idx, Index H,
                              const A* dq,  // in     (N, H)
                              const C* h,   // in     (N, H)
                              C* gates,     // inout  (N, 3*H): r -> dgx_r
                              A* dh) {      // inout  (N, H): += dq r
  gates += gate_offset(idx, H, 3);
  A dgx_r;
  dh[idx] += gru_reset_backward(dq[idx], static_cast<A>(gates[0]), static_cast<A>(h[idx]), dgx_r);
  gates[0] = static_cast<C>(dgx_r);
}

}  // namespace xprnn
