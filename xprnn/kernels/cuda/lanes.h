// What a warp's lanes tell each other beyond device.h, in the same way: the tests have it for a CPU.

namespace xprnn {

// The value of the lane whose number differs from this one's in `bits`; by a whole warp.
XP_FN float across(float v, int bits) { return __shfl_xor_sync(0xffffffffu, v, bits); }

}  // namespace xprnn
