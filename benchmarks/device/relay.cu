// How long a word takes from block to block through L2, the way the kernels for whole sequences
// send it. Stands behind common.h and device.h of xprnn/kernels/cuda/.

namespace xprnn {

// Two blocks, a thread of each, hand a word to and fro, `rounds` times: block 0 leaves k in
// words[0], block 1 waits for it and leaves k in words[apart], for which block 0 waits.
//
// words   (apart + 1,) zeros at first, =
// spins   polls before a wait is given up; then *report = tag + k
XP_KERNEL(32) relay(Word* words, Word apart, Word rounds, Word spins, Word* report, Word tag) {
  if (threadIdx.x) return;
  const bool first = blockIdx.x == 0;
  Word* const mine = first ? words : words + apart;
  const Word* const other = first ? words + apart : words;
  for (Word k = 1; k <= rounds; ++k) {
    if (first) publish(mine, k);
    for (Word left = spins; poll(other) != k; pause())
      if (!left--) {
        tell_host(report, tag + (k < 0xffffffu ? k : 0xffffffu));
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

}  // namespace xprnn
