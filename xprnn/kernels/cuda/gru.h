// The GRU cell in its two forms. The equations are those of cells/gru.py.

namespace xprnn {

// h' = n + z (h - n)
template <class A>
XP_FN A gru_update(A z, A n, A h) {
  return n + z * (h - n);
}

// Inverts gru_update and the activations of z and n; returns dh' z, the direct part of dh.
template <class A>
XP_FN A gru_update_backward(A dh, A z, A n, A h, A& dgx_z, A& dgx_n) {
  const A dn = dh * (1 - z);
  dgx_n = dn * (1 - n * n);
  dgx_z = dn * (h - n) * z;
  return dh * z;
}

// Reset after the product: takes gx and gh of each gate, gives the gates, returns h'.
template <class A>
XP_FN A gru_step(A gx_r, A gx_z, A gx_n, A gh_r, A gh_z, A gh_n, A h, A& r, A& z, A& n) {
  r = sigmoid(gx_r + gh_r);
  z = sigmoid(gx_z + gh_z);
  n = tanh_of(gx_n + r * gh_n);
  return gru_update(z, n, h);
}

// Inverts gru_step; dgh = [dgx_r dgx_z dgh_n]; returns the direct part of dh.
template <class A>
XP_FN A gru_step_backward(A dh, A r, A z, A n, A gh_n, A h, A& dgx_r, A& dgx_z, A& dgx_n,
                          A& dgh_n) {
  const A dh_direct = gru_update_backward(dh, z, n, h, dgx_z, dgx_n);
  dgx_r = dgx_n * gh_n * r * (1 - r);
  dgh_n = dgx_n * r;
  return dh_direct;
}

// Reset before the product, gates and candidate with a product of q = r h between them.
template <class A>
XP_FN A gru_reset(A gx_r, A gx_z, A gh_r, A gh_z, A h, A& r, A& z) {
  r = sigmoid(gx_r + gh_r);
  z = sigmoid(gx_z + gh_z);
  return r * h;
}

template <class A>
XP_FN A gru_candidate(A gx_n, A gh_n, A z, A h, A& n) {
  n = tanh_of(gx_n + gh_n);
  return gru_update(z, n, h);
}

// Inverts q = r h and the activation of r; returns dq r, its part of dh.
template <class A>
XP_FN A gru_reset_backward(A dq, A r, A h, A& dgx_r) {
  dgx_r = dq * h * r * (1 - r);
  return dq * r;
}

// GRU.forward_gates. gh (N, 3*H), h (N, H) and bias_hh (3*H,), or null, are read;
// gates (N, 3*H) is read as gx, then = r z n; saved (N, H) = gh_n; h_next (N, H) =
template <class T, class A>
XP_FN void gru_forward_gates(Index i, Index H, const A* gh, const T* h, const A* bias_hh,
                             T* gates, T* saved, T* h_next) {
  const Index at = in_blocks(i, H, 3);
  gates += at;
  gh += at;
  A gh_n = gh[2 * H];
  if (bias_hh) gh_n += bias_hh[2 * H + i - row_of(i, H) * H];  // r and z have theirs in gx
  A r, z, n;
  const A next = gru_step(static_cast<A>(gates[0]), static_cast<A>(gates[H]),
                          static_cast<A>(gates[2 * H]), gh[0], gh[H], gh_n,
                          static_cast<A>(h[i]), r, z, n);
  gates[0] = static_cast<T>(r);
  gates[H] = static_cast<T>(z);
  gates[2 * H] = static_cast<T>(n);
  saved[i] = static_cast<T>(gh_n);
  h_next[i] = static_cast<T>(next);
}

// GRU.backward_gates. h (N, H) is read; gates (N, 3*H) is read as r z n, then = dgh;
// saved (N, H) is read as gh_n, then = dgx_n; dh (N, H) is read as dh', then = dh' z
template <class T, class A>
XP_FN void gru_backward_gates(Index i, Index H, const T* h, T* gates, T* saved, A* dh) {
  gates += in_blocks(i, H, 3);
  A dgx_r, dgx_z, dgx_n, dgh_n;
  dh[i] = gru_step_backward(dh[i], static_cast<A>(gates[0]), static_cast<A>(gates[H]),
                            static_cast<A>(gates[2 * H]), static_cast<A>(saved[i]),
                            static_cast<A>(h[i]), dgx_r, dgx_z, dgx_n, dgh_n);
  gates[0] = static_cast<T>(dgx_r);
  gates[H] = static_cast<T>(dgx_z);
  gates[2 * H] = static_cast<T>(dgh_n);
  saved[i] = static_cast<T>(dgx_n);
}

// GRUResetBefore.forward_reset. gh_rz (N, 2*H) and h (N, H) are read;
// r and z of gates (N, 3*H) are read as gx, then =; saved (N, H) = q
template <class T, class A>
XP_FN void gru_forward_reset(Index i, Index H, const A* gh_rz, const T* h, T* gates, T* saved) {
  gates += in_blocks(i, H, 3);
  gh_rz += in_blocks(i, H, 2);
  A r, z;
  const A q = gru_reset(static_cast<A>(gates[0]), static_cast<A>(gates[H]), gh_rz[0], gh_rz[H],
                        static_cast<A>(h[i]), r, z);
  gates[0] = static_cast<T>(r);
  gates[H] = static_cast<T>(z);
  saved[i] = static_cast<T>(q);
}

// GRUResetBefore.forward_candidate. gh_n (N, H), h (N, H) and z of gates (N, 3*H) are read;
// n of gates is read as gx, then =; h_next (N, H) =
template <class T, class A>
XP_FN void gru_forward_candidate(Index i, Index H, const A* gh_n, const T* h, T* gates,
                                 T* h_next) {
  gates += in_blocks(i, H, 3);
  A n;
  const A next = gru_candidate(static_cast<A>(gates[2 * H]), gh_n[i], static_cast<A>(gates[H]),
                               static_cast<A>(h[i]), n);
  gates[2 * H] = static_cast<T>(n);
  h_next[i] = static_cast<T>(next);
}

// GRUResetBefore.backward_candidate. h (N, H) is read; z and n of gates (N, 3*H) are read,
// then = dgx_z and dgx_n; dh (N, H) is read as dh', then = dh' z
template <class T, class A>
XP_FN void gru_backward_candidate(Index i, Index H, const T* h, T* gates, A* dh) {
  gates += in_blocks(i, H, 3);
  A dgx_z, dgx_n;
  dh[i] = gru_update_backward(dh[i], static_cast<A>(gates[H]), static_cast<A>(gates[2 * H]),
                              static_cast<A>(h[i]), dgx_z, dgx_n);
  gates[H] = static_cast<T>(dgx_z);
  gates[2 * H] = static_cast<T>(dgx_n);
}

// GRUResetBefore.backward_reset. dq (N, H) and h (N, H) are read; r of gates (N, 3*H) is read,
// then = dgx_r; dh (N, H) += dq r
template <class T, class A>
XP_FN void gru_backward_reset(Index i, Index H, const A* dq, const T* h, T* gates, A* dh) {
  gates += in_blocks(i, H, 3);
  A dgx_r;
  dh[i] += gru_reset_backward(dq[i], static_cast<A>(gates[0]), static_cast<A>(h[i]), dgx_r);
  gates[0] = static_cast<T>(dgx_r);
}

}  // namespace xprnn
