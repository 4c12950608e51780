// Ping-pong latency: the time in which a word gets from block to block through L2, sent as the
// sequence kernels send it, and the time of reads from L2. Is included after common.h and device.h
// of xprnn/kernels/cuda/.

namespace xprnn {

// One thread of each of two blocks exchanges words, `rounds` times: block 0 stores k in words[0],
// block 1 waits for it and stores k in words[apart], for which block 0 waits.
//
// words   (apart + 1,) inout: zeros initially
// polls   before a wait times out; then *report = tag + k
XP_KERNEL(32) ping_pong(Word* words, Word apart, Word rounds, Word polls, Word* report, Word tag) {
  if (threadIdx.x) return;
  const bool first = blockIdx.x == 0;
  Word* const mine = first ? words : words + apart;
  const Word* const other = first ? words + apart : words;
  for (Word k = 1; k <= rounds; ++k) {
    if (first) publish(mine, k);
    for (Word left = polls; poll(other) != k; pause())
      if (!left--) {
        store_to_host(report, tag + (k < 0xffffffu ? k : 0xffffffu));
        return;
      }
    if (!first) publish(mine, k);
  }
}

// One thread polls `rounds` times for a word that is present; the address of each poll depends on
// the result of the previous one.
//
// words   (1,) in: 0
XP_KERNEL(32) poll_words(const Word* words, Word rounds) {
  if (threadIdx.x) return;
  Word at = 0;
  for (Word k = 0; k < rounds; ++k) at = poll(words + at);
}

// All blocks read `count` times 16 bytes, `rounds` times; each round a block reads another share,
// which is not in its L1. Weights that the previous step left in L2 are read in the same way.
//
// data    (4 * count,) in: zeros
// sum     (1,) out: 1 if a value is not zero, so that the compiler cannot remove the reads
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
