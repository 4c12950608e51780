// What the kernels of every cell share. Stands before the header of a cell.
//
// Each of those has two halves. First functions of values in registers, in the type A of the
// arithmetic: they touch no memory and serve kernels of any kind. Then element functions, which
// serve ElementwiseKernel: they load what one element of the state (N, H) needs, compute in A,
// and store. Numbers that products read are stored as T, all others as A: A is float where T is
// float16 or bfloat16, else T. A value is rounded to T exactly where it is stored.
//
// Every array is C-contiguous; element i of the state is row i / H, column i % H. An element
// reads and writes its own row and column only, so elements may run in any order.
//
// Only what NVRTC has without any include, so that g++ needs no more than a few definitions.

#define XP_FN __device__ __forceinline__

namespace xprnn {

typedef long long Index;  // N * H may exceed 31 bits

XP_FN float exp_of(float a) { return expf(a); }
XP_FN double exp_of(double a) { return exp(a); }
XP_FN float tanh_of(float a) { return tanhf(a); }
XP_FN double tanh_of(double a) { return tanh(a); }

// exp of it is still finite
XP_FN float largest_exponent(float) { return 88.0f; }
XP_FN double largest_exponent(double) { return 709.0; }

// σ(a) = 1 / (1 + exp(-a)): relative error of a few units however small it is, no overflow.
// Mirrors numerics.sigmoid. CuPy flushes float subnormals, so below a = -87.3 the result is 0.
template <class A>
XP_FN A sigmoid(A a) {
  A exponent = -a;
  if (exponent > largest_exponent(a)) exponent = largest_exponent(a);  // a NaN stays
  return A(1) / (A(1) + exp_of(exponent));
}

// The row of element i in an (N, H) array.
XP_FN Index row_of(Index i, Index H) {
  // A division of 64 bits takes several times as long, and few arrays need one
  return i >> 31 ? i / H : static_cast<int>(i) / static_cast<int>(H);
}

// Where element i of an (N, H) array stands in the first H columns of an (N, blocks * H) one.
XP_FN Index in_blocks(Index i, Index H, int blocks) { return i + row_of(i, H) * (blocks - 1) * H; }

}  // namespace xprnn
