// The recurrent matrix products of a persistent sequence kernel. Included after exchange.h.
//
// A block holds the weights of its units for the whole sequence, as operands of mma, in registers
// and in shared memory. Its warps split the reduction and store partial sums in shared memory, of
// which each thread then adds up those of two hidden units of some rows.

namespace xprnn {

constexpr int UNITS = 16;           // hidden units of a block
constexpr int PAIRS = UNITS / 2;    // a thread computes two of them
constexpr int PITCH = 20;           // floats per row of partial sums; avoids bank conflicts
constexpr int POLL_DEPTH = 8;       // k-blocks that a lane polls at once
constexpr int SPLIT_LIMIT = 8;      // k-blocks whose split operands for TF32X3 fit in registers
constexpr int SHARED_HEADER = 128;  // bytes at the start of shared memory

// One k-block of a lane's weights in mma's order. `source(gate, row, k_block)` gives its 16 bytes
// of the block's row lane / 4 + `row`.
template <class Source>
XP_FN void fragment(const Source& source, int gate, int k, Word (&a)[8]) {
  const uint4 p = source(gate, 0, k), q = source(gate, 8, k);
  a[0] = p.x, a[1] = q.x, a[2] = p.y, a[3] = q.y;
  a[4] = p.z, a[5] = q.z, a[6] = p.w, a[7] = q.w;
}

// The weight operands of one lane: 16 bytes of each k-block, of two of the block's 16 rows. The
// first `in_registers` of `k_blocks` are held in registers, the others in shared memory.
template <int k_blocks, int in_registers>
struct Fragments {
  Word registers[in_registers ? in_registers : 1][8];
  uint4* in_shared;  // of this lane; consecutive vectors are 32 apart

  XP_FN static constexpr int shared_vectors() { return 64 * (k_blocks - in_registers); }  // a warp

  // Returns whether all weights are finite floats.
  template <class Source>
  XP_FN bool load(const Source& source, int gate) {
    bool finite = true;
#pragma unroll
    for (int k = 0; k < k_blocks; ++k) {
      Word a[8];
      fragment(source, gate, k, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) finite = finite && is_finite(a[i]);
      if (k < in_registers) {
#pragma unroll
        for (int i = 0; i < 8; ++i) registers[k < in_registers ? k : 0][i] = a[i];
      } else {
        in_shared[(k - in_registers) * 64] = make_uint4(a[0], a[1], a[2], a[3]);
        in_shared[(k - in_registers) * 64 + 32] = make_uint4(a[4], a[5], a[6], a[7]);
      }
    }
    return finite;
  }
  // `keep`: values computed from them may stay in registers from step to step.
  template <bool keep>
  XP_FN void get(int k, Word (&a)[8]) const {
    if (k < in_registers) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = registers[k < in_registers ? k : 0][i];
        if (!keep) a[i] = opaque(a[i]);
      }
    } else {
      const uint4 p = in_shared[(k - in_registers) * 64];
      const uint4 q = in_shared[(k - in_registers) * 64 + 32];
      a[0] = p.x, a[1] = p.y, a[2] = p.z, a[3] = p.w;
      a[4] = q.x, a[5] = q.y, a[6] = q.z, a[7] = q.w;
    }
  }
};

// TF32X3 multiplies to float32 accuracy: a = high + low, both exact in tf32 but for the last bits
// of low; low times low is negligible. For half a k-block, c += low * high + high * low. An
// infinity has no low part, and times the zero low part of another operand it would give NaN: with
// `nonfinite` it is left out of these terms.
template <bool nonfinite>
XP_FN void add_cross_terms(float (&c)[4], const Word* a, Word b0, Word b1) {
  const Word high = 0xffffe000u;
  Word a_low[4], a_high[4], b_low[2], b_high[2];
  const Word b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool none = nonfinite && !is_finite(a[i]);
    a_high[i] = none ? 0 : a[i] & high;
    a_low[i] = none ? 0 : word_of(float_of(a[i]) - float_of(a[i] & high));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool none = nonfinite && !is_finite(b[i]);
    b_high[i] = none ? 0 : b[i] & high;
    b_low[i] = none ? 0 : word_of(float_of(b[i]) - float_of(b[i] & high));
  }
  mma_tf32(c, a_low, b_high[0], b_high[1]);
  mma_tf32(c, a_high, b_low[0], b_low[1]);
}

// c (16 units, 8 rows) += the product of one k-block, in two mma steps of half of its words each.
template <int mode>
XP_FN void multiply(float (&c)[4], const Word (&a)[8], uint4 b) {
  if constexpr (mode == BF16) {
    mma_bf16(c, a, b.x, b.y);
    mma_bf16(c, a + 4, b.z, b.w);
  } else if constexpr (mode == F16) {
    mma_f16(c, a, b.x, b.y);
    mma_f16(c, a + 4, b.z, b.w);
  } else {
    mma_tf32(c, a, b.x, b.y);
    mma_tf32(c, a + 4, b.z, b.w);
  }
}

// As `multiply`, for TF32X3. Tensor cores round every sum toward zero, so few large sums are formed
// there: each k-block has its own accumulator, starts with the cross terms and is added to c with
// rounding to nearest. It starts from a zero that depends on `before`, another sum: otherwise the
// compiler starts all k-blocks at once and runs out of registers.
template <bool nonfinite>
XP_FN void multiply_tf32x3(float (&c)[4], const float (&before)[4], const Word (&a)[8], uint4 b) {
  float block_sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) block_sum[i] = zero_after(before[i]);
  add_cross_terms<nonfinite>(block_sum, a, b.x, b.y);
  add_cross_terms<nonfinite>(block_sum, a + 4, b.z, b.w);
  multiply<TF32>(block_sum, a, b);  // reads only the high parts
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += block_sum[i];
}

// Loads all weights of a warp; `in_shared` is its part of shared memory. Returns whether all are
// finite floats.
template <int gates, int k_blocks, int in_registers, class Source>
XP_FN bool load_weights(Fragments<k_blocks, in_registers> (&weights)[gates], uint4* in_shared,
                        const Source& source) {
  bool finite = true;
#pragma unroll
  for (int gate = 0; gate < gates; ++gate) {
    weights[gate].in_shared = in_shared + gate * weights[gate].shared_vectors() + threadIdx.x % 32;
    const bool all = weights[gate].load(source, gate);
    finite = finite && all;
  }
  return all_lanes(finite);
}

// TF32X3 where some operands are not finite: as `multiply_row`, of k-blocks that have arrived. The
// weights are read from global memory: the case is rare and must not cost the fast path registers.
template <int gates, int accumulators, class Source>
XP_FN void multiply_nonfinite(float (&sums)[accumulators][4], const Source& source, const Word* p,
                              int words, int first, int count) {
#pragma unroll 1
  for (int k = first; k < first + count; ++k) {
    const uint4 b = k * K_BLOCK_WORDS < words ? poll4(p + k * K_BLOCK_WORDS)
                                              : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      Word a[8];
      fragment(source, gate, k, a);
      multiply_tf32x3<true>(sums[gate], sums[gate], a, b);
    }
  }
}

// Accumulators for `gates` gates: few gates have several each, to keep the tensor cores busy.
constexpr int accumulators_of(int gates) { return gates < 3 ? 3 * gates : gates; }

template <int accumulators>
XP_FN void clear(float (&sums)[accumulators][4]) {
#pragma unroll
  for (int i = 0; i < 4 * accumulators; ++i) sums[i / 4][i % 4] = 0;
}

// sums (16 units, 8 rows) of each gate += k-block k of the weights times k-block b of a row.
template <int mode, int accumulators, int gates, int k_blocks, int in_registers>
XP_FN void multiply_k_block(float (&sums)[accumulators][4],
                            const Fragments<k_blocks, in_registers> (&weights)[gates], int k,
                            uint4 b) {
  constexpr bool keep = mode != TF32X3 || gates * in_registers <= SPLIT_LIMIT;
#pragma unroll
  for (int gate = 0; gate < gates; ++gate) {
    Word a[8];
    weights[gate].template get<keep>(k, a);
    const int first = k % (accumulators / gates) * gates;  // of this k-block's accumulators
    float (&sum)[4] = sums[first + gate];
    if constexpr (mode == TF32X3)  // of four gates, two at a time
      multiply_tf32x3<false>(sum, sums[first + (gates > 3 ? (gate + 2) % gates : gate)], a, b);
    else
      multiply<mode>(sum, a, b);
  }
}

// sums += the warp's share of the reduction over a row of the exchange buffer, of which `words`
// words remain from p on, where this lane starts. Returns false on a timeout.
template <int mode, int first = 0, int accumulators, int gates, int k_blocks, int in_registers,
          class Source>
XP_FN bool multiply_row(float (&sums)[accumulators][4],
                        const Fragments<k_blocks, in_registers> (&weights)[gates],
                        const Source& source, bool nonfinite, const Word* p, int words,
                        Word max_polls) {
  constexpr int waits = (k_blocks + POLL_DEPTH - 1) / POLL_DEPTH;
  constexpr int each = (k_blocks + waits - 1) / waits;  // k-blocks of a wait, of nearly equal size
  constexpr int count = k_blocks - first < each ? k_blocks - first : each;
  uint4 b[count];
  const RowBlocks blocks = {p + first * K_BLOCK_WORDS, words - first * K_BLOCK_WORDS};
  const PollResult result = await<mode>(b, blocks, max_polls);
  if (result == TIMED_OUT) return false;
  bool fast_path = true;
  if constexpr (mode == TF32X3) {
    fast_path = !nonfinite && result != MAYBE_NONFINITE;
    if (!fast_path) multiply_nonfinite<gates>(sums, source, p, words, first, count);
  }
  if (fast_path) {
#pragma unroll
    for (int k = 0; k < count; ++k) multiply_k_block<mode>(sums, weights, first + k, b[k]);
  }
  if constexpr (first + count < k_blocks)
    return multiply_row<mode, first + count>(sums, weights, source, nonfinite, p, words,
                                             max_polls);
  return true;
}

// Stores a warp's sums of one tile of 8 rows for `sum_over_warps`.
// partial  out (warps, gates, rows, PITCH)
template <int gates, int rows, int accumulators>
XP_FN void store_partial_sums(float* partial, int warp, int lane, int tile,
                              float (&sums)[accumulators][4]) {
#pragma unroll
  for (int i = 4 * gates; i < 4 * accumulators; ++i)
    sums[i / 4 % gates][i % 4] += sums[i / 4][i % 4];
#pragma unroll
  for (int gate = 0; gate < gates; ++gate) {
    float* p =
        partial + ((warp * gates + gate) * rows + tile * 8 + lane % 4 * 2) * PITCH + lane / 4;
    p[0] = sums[gate][0];
    p[PITCH] = sums[gate][1];
    p[8] = sums[gate][2];
    p[PITCH + 8] = sums[gate][3];
  }
}

// Where this lane starts in row n; past the end of the pass, in its first row, which will be
// written.
XP_FN const Word* exchange_row(const Word* p, int words, int n, int first, int end) {
  return p + static_cast<Index>(n < end ? n : first) * words;
}

// The warp's share of one pass, over rows first .. end - 1 of a step's slots; p is where this lane
// starts in row 0. Returns false on a timeout.
template <int mode, int row_tiles, int gates, int k_blocks, int in_registers, class Source>
XP_FN bool multiply_pass(float* partial, const Fragments<k_blocks, in_registers> (&weights)[gates],
                         const Source& source, bool nonfinite, const Word* p, int words, int left,
                         int first, int end, Word max_polls) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int tile = 0; tile < row_tiles && first + 8 * tile < end; ++tile) {
    const int n = first + 8 * tile + lane / 4;
    const Word* const row = exchange_row(p, words, n, first, end);
    float sums[accumulators_of(gates)][4] = {};
    if (!multiply_row<mode>(sums, weights, source, nonfinite, row, left, max_polls)) return false;
    store_partial_sums<gates, 8 * row_tiles>(partial, warp, lane, tile, sums);
  }
  return true;
}

// The sum over all warps, for two units of one row.
template <int warps, int gates, int rows>
XP_FN float2 sum_over_warps(const float* partial, int gate, int row, int pair) {
  float2 sum;
  sum.x = sum.y = 0;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) {
    const float* p = partial + ((warp * gates + gate) * rows + row) * PITCH + 2 * pair;
    const float2 part = *reinterpret_cast<const float2*>(p);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

}  // namespace xprnn
