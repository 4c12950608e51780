// Communication between the lanes of a warp; like device.h, replaced when tests run on a CPU.

namespace xprnn {

// The value of the lane whose number differs from this lane's in `bits`; called by the whole warp.
XP_FN float shuffle_xor(float v, int bits) { return __shfl_xor_sync(0xffffffffu, v, bits); }

}  // namespace xprnn
