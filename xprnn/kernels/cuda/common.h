// Definitions shared by the kernels of every cell; included before the header of a cell.
//
// A cell's header has two parts. The value functions compute in registers, in the accumulation
// dtype A; they access no memory and are used by kernels of every kind. The element functions are
// the bodies of ElementwiseKernels: they load the operands of one element of the state (N, H),
// compute in A and store the results. Operands of matrix products are stored in the compute dtype
// C, everything else in A. A is float where C is float16 or bfloat16, otherwise A = C. A value is
// rounded to C only where it is stored.
//
// All arrays are C-contiguous. Element idx of the state is row idx / H, column idx % H. An element
// function accesses only its own row and column, so elements may be processed in any order.
//
// Only features that NVRTC provides without includes are used, so that the tests can compile the
// headers with g++ and a few definitions.

#define XP_FN __device__ __forceinline__

namespace xprnn {

typedef long long Index;  // N * H may exceed 31 bits

XP_FN float exp_of(float a) { return expf(a); }
XP_FN double exp_of(double a) { return exp(a); }
XP_FN float tanh_of(float a) { return tanhf(a); }
XP_FN double tanh_of(double a) { return tanh(a); }

// An argument for which exp is still finite.
XP_FN float largest_exponent(float) { return 88.0f; }
XP_FN double largest_exponent(double) { return 709.0; }

// σ(a) = 1 / (1 + exp(-a)), without overflow and with a relative error of a few ulps even where
// the result is tiny. Same formula as numerics.sigmoid. CuPy compiles with float subnormals
// flushed to zero, so in float the result is 0 below a = -87.3.
template <class A>
XP_FN A sigmoid(A a) {
  A exponent = -a;
  if (exponent > largest_exponent(a)) exponent = largest_exponent(a);  // a NaN is kept
  return A(1) / (A(1) + exp_of(exponent));
}

// Row of element i of an (N, H) array.
XP_FN Index row_of(Index i, Index H) {
  // A 64-bit division is several times slower, and few arrays need one.
  return i >> 31 ? i / H : static_cast<int>(i) / static_cast<int>(H);
}

// Offset of element i of an (N, H) array in the first H columns of an (N, gates * H) array.
XP_FN Index gate_offset(Index i, Index H, int gates) { return i + row_of(i, H) * (gates - 1) * H; }

}  // namespace xprnn
