// kernels/cuda/lanes.h for the emulator; included after warps.h.

namespace xprnn {

inline float shuffle_xor(float v, int bits) {
  const unsigned own = word_of(v);
  return float_of(emulator::collect(5, &own, 1)[threadIdx.x % 32 ^ bits][0]);
}

}  // namespace xprnn
