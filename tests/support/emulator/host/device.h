// Definitions of the CUDA features that the kernels use, for g++ on the host: the keywords
// __device__, __grid_constant__ and __forceinline__, mathematical functions, and CuPy's two 16-bit
// types. Nothing is included, so that compiling a kernel takes a few hundredths of a second.

#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))

typedef __PTRDIFF_TYPE__ ptrdiff_t;

extern "C" float expf(float);
extern "C" float tanhf(float);
extern "C" double exp(double);
extern "C" double tanh(double);
extern "C" float logf(float);
extern "C" double log(double);
extern "C" float log1pf(float);
extern "C" double log1p(double);
extern "C" float expm1f(float);
extern "C" double expm1(double);
extern "C" float sqrtf(float);
extern "C" double sqrt(double);
extern "C" float fabsf(float);
extern "C" double fabs(double);

// Like CuPy's classes of these names: a two-byte value that converts from and to float.

class float16 {
  _Float16 value;

 public:
  float16() = default;
  float16(float v) : value(static_cast<_Float16>(v)) {}
  operator float() const { return static_cast<float>(value); }
};

class bfloat16 {
  unsigned short bits;

 public:
  bfloat16() = default;
  bfloat16(float v) {
    unsigned int u;
    __builtin_memcpy(&u, &v, sizeof u);
    if (v != v)
      bits = static_cast<unsigned short>(u >> 16 | 0x40);  // quiet, so that it remains a NaN
    else
      bits = static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16);  // ties to even
  }
  operator float() const {
    unsigned int u = static_cast<unsigned int>(bits) << 16;
    float v;
    __builtin_memcpy(&v, &u, sizeof v);
    return v;
  }
};
