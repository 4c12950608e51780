// kernels/cuda/lanes.h for the fibers of fibers.h; stands behind warps.h.

namespace xprnn {

inline float across(float v, int bits) {
  const unsigned mine = word_of(v);
  return float_of(fibers::collect(5, &mine, 1)[threadIdx.x % 32 ^ bits][0]);
}

}  // namespace xprnn
