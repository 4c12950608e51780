// Functions of definitions, as cells/definition/operations.py lists them; included after common.h.
//
// A NaN is kept, as NumPy's functions keep it. Nothing assumes that values are finite: a state may
// begin at -inf.

namespace xprnn {

XP_FN float log_of(float a) { return logf(a); }
XP_FN double log_of(double a) { return log(a); }
XP_FN float log1p_of(float a) { return log1pf(a); }
XP_FN double log1p_of(double a) { return log1p(a); }
XP_FN float expm1_of(float a) { return expm1f(a); }
XP_FN double expm1_of(double a) { return expm1(a); }
XP_FN float sqrt_of(float a) { return sqrtf(a); }
XP_FN double sqrt_of(double a) { return sqrt(a); }
XP_FN float abs_of(float a) { return fabsf(a); }
XP_FN double abs_of(double a) { return fabs(a); }

template <class A>
XP_FN A minimum(A a, A b) {
  return a < b || a != a ? a : b;
}

template <class A>
XP_FN A maximum(A a, A b) {
  return a > b || a != a ? a : b;
}

template <class A>
XP_FN A clip(A a, A low, A high) {
  return minimum(maximum(a, low), high);
}

template <class A>
XP_FN A relu(A a) {
  return a < 0 ? A(0) : a;
}

template <class A>
XP_FN A leaky_relu(A a, A slope) {
  return a > 0 ? a : slope * a;
}

// alpha (exp(a) - 1) below 0
template <class A>
XP_FN A elu(A a, A alpha) {
  return a > 0 ? a : alpha * expm1_of(a);
}

// log(1 + exp(a)): without overflow, and with a small relative error where the result is tiny
template <class A>
XP_FN A softplus(A a) {
  return relu(a) + log1p_of(exp_of(-abs_of(a)));
}

template <class A>
XP_FN A softsign(A a) {
  return a / (abs_of(a) + 1);
}

template <class A>
XP_FN A hard_sigmoid(A a, A alpha, A beta) {
  return clip(alpha * a + beta, A(0), A(1));
}

// The accumulation dtype of a compute dtype.
template <class C>
struct Accumulation {
  typedef float Type;
};
template <>
struct Accumulation<double> {
  typedef double Type;
};

}  // namespace xprnn
