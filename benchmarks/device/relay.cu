// How long a word takes from block to block through L2, the way the kernels for whole sequences
// send it, and how long reading from there takes. Stands behind common.h and device.h of xprnn/kernels/cuda/.

namespace xprnn {

// Two blocks, a thread of each, hand a word to and fro, `rounds` times: block 0 leaves k in
// words[0], block 1 waits for it and leaves k in words[apart], for which block 0 waits.
//
// words   (apart + 1,) zeros at first, =
// max_polls   polls before a wait is given up; then *report = tag + k
XP_KERNEL(32) relay(Word* words, Word apart, Word rounds, Word max_polls, Word* report, Word tag) {
  if (threadIdx.x) return;
  const bool first = blockIdx.x == 0;
  Word* const mine = first ? words : words + apart;
  const Word* const other = first ? words + apart : words;
  for (Word k = 1; k <= rounds; ++k) {
    if (first) publish(mine, k);
    for (Word left = max_polls; poll(other) != k; pause())
      if (!left--) {
        store_to_host(report, tag + (k < 0xffffffu ? k : 0xffffffu));
        return;
      }
    if (!first) publish(mine, k);
  }
}

// One thread polls `rounds` times for a word that is there; each poll's address hangs on the
// poll before it. words (1,) is 0 and is read.
XP_KERNEL(32) look(const Word* words, Word rounds) {
  if (threadIdx.x) return;
  Word at = 0;
  for (Word k = 0; k < rounds; ++k) at = poll(words + at);
}

// All blocks read `count` times 16 bytes, `rounds` times over: every time each another's share, so
// that none has its own in L1. As a step reads weights that the step before has left in L2.
//
// data    (4 * count,) zeros, read
// sum     (1,) = 1 where something else stands there, which the compiler cannot know
XP_KERNEL(1024) sweep(const uint4* data, Word count, Word rounds, Word blocks, Word* sum) {
  const Word share = (count + blocks - 1) / blocks;
  Word any = 0;
  for (Word round = 0; round < rounds; ++round) {
    const Word first = (blockIdx.x + round) % blocks * share;
    const Word end = first + share < count ? first + share : count;
#pragma unroll 4
    for (Word i = first + threadIdx.x; i < end; i += 1024) {
      const uint4 v = data[i];
      any |= v.x | v.y | v.z | v.w;
    }
  }
  if (any) *sum = 1;
}

}  // namespace xprnn
