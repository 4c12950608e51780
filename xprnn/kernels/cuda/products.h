// How the blocks of a kernel that runs a whole sequence multiply. Stands behind exchange.h.
//
// The weights of a block stay where it computes for the whole sequence, as operands of mma, in
// registers and in shared memory. Its warps share out the reduction and leave partial sums in
// shared memory, of which each thread then takes those of two hidden units of some rows.

namespace xprnn {

constexpr int UNITS = 16;         // hidden units of a block
constexpr int PAIRS = UNITS / 2;  // a thread computes for two of them
constexpr int PITCH = 20;         // floats from row to row of partial sums: no bank conflicts
constexpr int AHEAD = 8;          // pieces that a lane polls for at once
constexpr int KEPT = 8;           // pieces of weights whose two parts for TF32X3 fit in registers
constexpr int HEAD = 128;         // bytes of shared memory before everything else

// One piece of a lane's weights in mma's order. `source(gate, row, piece)` gives 16 bytes of it in
// the block's row lane / 4 + `row`.
template <class Source>
XP_FN void fragment(const Source& source, int gate, int k, Word (&a)[8]) {
  const uint4 p = source(gate, 0, k), q = source(gate, 8, k);
  a[0] = p.x, a[1] = q.x, a[2] = p.y, a[3] = q.y;
  a[4] = p.z, a[5] = q.z, a[6] = p.w, a[7] = q.w;
}

// The operands of one lane: of a block's 16 rows of weights two, of each piece of these 16 bytes.
// The first `held` of `chunks` pieces stay in registers, the others in shared memory.
template <int chunks, int held>
struct Fragments {
  Word registers[held ? held : 1][8];
  uint4* rest;  // of this lane; its parts stand 32 apart

  XP_FN static constexpr int rest_of_warp() { return 64 * (chunks - held); }

  // Returns whether all are finite floats.
  template <class Source>
  XP_FN bool load(const Source& source, int gate) {
    bool finite = true;
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      Word a[8];
      fragment(source, gate, k, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) finite = finite && is_finite(a[i]);
      if (k < held) {
#pragma unroll
        for (int i = 0; i < 8; ++i) registers[k < held ? k : 0][i] = a[i];
      } else {
        rest[(k - held) * 64] = make_uint4(a[0], a[1], a[2], a[3]);
        rest[(k - held) * 64 + 32] = make_uint4(a[4], a[5], a[6], a[7]);
      }
    }
    return finite;
  }
  // `keep`: what is computed from them may stay in registers from step to step.
  template <bool keep>
  XP_FN void get(int k, Word (&a)[8]) const {
    if (k < held) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = registers[k < held ? k : 0][i];
        if (!keep) a[i] = unknown(a[i]);
      }
    } else {
      const uint4 p = rest[(k - held) * 64], q = rest[(k - held) * 64 + 32];
      a[0] = p.x, a[1] = p.y, a[2] = p.z, a[3] = p.w;
      a[4] = q.x, a[5] = q.y, a[6] = q.z, a[7] = q.w;
    }
  }
};

// TF32X3 multiplies to float32's accuracy: a = high + low, each of them exact in tf32 but for low's
// last bits; low times low is too small to count. Of half a piece, c += low times high and high
// times low. An infinity has no low part, and as a factor of another one's it would make NaN of 0:
// with `special` it counts in neither.
template <bool special>
XP_FN void add_cross_terms(float (&c)[4], const Word* a, Word b0, Word b1) {
  const Word high = 0xffffe000u;
  Word a_low[4], a_high[4], b_low[2], b_high[2];
  const Word b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool none = special && !is_finite(a[i]);
    a_high[i] = none ? 0 : a[i] & high;
    a_low[i] = none ? 0 : word_of(float_of(a[i]) - float_of(a[i] & high));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool none = special && !is_finite(b[i]);
    b_high[i] = none ? 0 : b[i] & high;
    b_low[i] = none ? 0 : word_of(float_of(b[i]) - float_of(b[i] & high));
  }
  mma_tf32(c, a_low, b_high[0], b_high[1]);
  mma_tf32(c, a_high, b_low[0], b_low[1]);
}

// c (16 units, 8 rows) += one piece: two steps of mma, which share out the piece's words alike.
template <int kind>
XP_FN void multiply(float (&c)[4], const Word (&a)[8], uint4 b) {
  if constexpr (kind == BF16) {
    mma_bf16(c, a, b.x, b.y);
    mma_bf16(c, a + 4, b.z, b.w);
  } else if constexpr (kind == F16) {
    mma_f16(c, a, b.x, b.y);
    mma_f16(c, a + 4, b.z, b.w);
  } else {
    mma_tf32(c, a, b.x, b.y);
    mma_tf32(c, a + 4, b.z, b.w);
  }
}

// As `multiply`, for TF32X3. Tensor cores cut every sum toward zero, so few that are large are made
// there: each piece has its own, begins with the cross terms, and is added to c with rounding. It
// begins at a zero that is made of `before`, a sum: the compiler would else begin all pieces at
// once, and have too few registers.
template <bool special>
XP_FN void multiply_tf32x3(float (&c)[4], const float (&before)[4], const Word (&a)[8], uint4 b) {
  float piece[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) piece[i] = zero_after(before[i]);
  add_cross_terms<special>(piece, a, b.x, b.y);
  add_cross_terms<special>(piece, a + 4, b.z, b.w);
  multiply<TF32>(piece, a, b);  // which reads high alone
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += piece[i];
}

// All weights of a warp; `rest` is its part of shared memory. Whether all are finite floats.
template <int gates, int chunks, int held, class Source>
XP_FN bool load_weights(Fragments<chunks, held> (&weights)[gates], uint4* rest,
                        const Source& source) {
  bool finite = true;
#pragma unroll
  for (int gate = 0; gate < gates; ++gate) {
    weights[gate].rest = rest + gate * weights[gate].rest_of_warp() + threadIdx.x % 32;
    const bool all = weights[gate].load(source, gate);
    finite = finite && all;
  }
  return all_lanes(finite);
}

// For TF32X3 where not everything is finite: as `multiply_row`, of pieces that are there. Weights
// come from global memory: it is rare, and must cost the usual way no registers.
template <int gates, int lines, class Source>
XP_FN void multiply_special(float (&sums)[lines][4], const Source& source, const Word* p, int words,
                            int first, int count) {
#pragma unroll 1
  for (int k = first; k < first + count; ++k) {
    const uint4 b = k * PIECE < words ? poll4(p + k * PIECE) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      Word a[8];
      fragment(source, gate, k, a);
      multiply_tf32x3<true>(sums[gate], sums[gate], a, b);
    }
  }
}

// Sums of `gates` gates are made in so many parts as keep mma busy.
constexpr int lines_of(int gates) { return gates < 3 ? 3 * gates : gates; }

template <int lines>
XP_FN void clear(float (&sums)[lines][4]) {
#pragma unroll
  for (int i = 0; i < 4 * lines; ++i) sums[i / 4][i % 4] = 0;
}

// sums (16 units, 8 rows) of each gate += what piece k of the weights makes of one of a row.
template <int kind, int lines, int gates, int chunks, int held>
XP_FN void multiply_piece(float (&sums)[lines][4], const Fragments<chunks, held> (&weights)[gates],
                          int k, uint4 b) {
  constexpr bool keep = kind != TF32X3 || gates * held <= KEPT;
#pragma unroll
  for (int gate = 0; gate < gates; ++gate) {
    Word a[8];
    weights[gate].template get<keep>(k, a);
    const int line = k % (lines / gates) * gates;
    float (&sum)[4] = sums[line + gate];
    if constexpr (kind == TF32X3)  // of four gates two at a time
      multiply_tf32x3<false>(sum, sums[line + (gates > 3 ? (gate + 2) % gates : gate)], a, b);
    else
      multiply<kind>(sum, a, b);
  }
}

// sums += the warp's share of the reduction over a row of the mailbox, of which `words` words are
// left from p on, where this lane begins. False: given up.
template <int kind, int first = 0, int lines, int gates, int chunks, int held, class Source>
XP_FN bool multiply_row(float (&sums)[lines][4], const Fragments<chunks, held> (&weights)[gates],
                        const Source& source, bool special, const Word* p, int words, Word spins) {
  constexpr int waits = (chunks + AHEAD - 1) / AHEAD, each = (chunks + waits - 1) / waits;  // alike
  constexpr int count = chunks - first < each ? chunks - first : each;
  uint4 b[count];
  const InRow pieces = {p + first * PIECE, words - first * PIECE};
  const Arrival arrival = await<kind>(b, pieces, spins);
  if (arrival == NEVER) return false;
  bool usual = true;
  if constexpr (kind == TF32X3) {
    usual = !special && arrival != SPECIAL;
    if (!usual) multiply_special<gates>(sums, source, p, words, first, count);
  }
  if (usual) {
#pragma unroll
    for (int k = 0; k < count; ++k) multiply_piece<kind>(sums, weights, first + k, b[k]);
  }
  if constexpr (first + count < chunks)
    return multiply_row<kind, first + count>(sums, weights, source, special, p, words, spins);
  return true;
}

// What a warp leaves of one tile of 8 rows, for `total`. partial: (warps, gates, rows, PITCH)
template <int gates, int rows, int lines>
XP_FN void leave(float* partial, int warp, int lane, int tile, float (&sums)[lines][4]) {
#pragma unroll
  for (int i = 4 * gates; i < 4 * lines; ++i) sums[i / 4 % gates][i % 4] += sums[i / 4][i % 4];
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

// Where this lane begins in row n; past the end of the pass in its first row, which is there too.
XP_FN const Word* row_of_mail(const Word* p, int words, int n, int first, int end) {
  return p + static_cast<Index>(n < end ? n : first) * words;
}

// The warp's part in one pass, over rows `first` and on of a block of the mailbox, before `end`;
// `p` is where this lane begins in row 0. False: given up.
template <int kind, int tiles, int gates, int chunks, int held, class Source>
XP_FN bool multiply_pass(float* partial, const Fragments<chunks, held> (&weights)[gates],
                         const Source& source, bool special, const Word* p, int words, int left,
                         int first, int end, Word spins) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int tile = 0; tile < tiles && first + 8 * tile < end; ++tile) {
    const int n = first + 8 * tile + lane / 4;
    const Word* const row = row_of_mail(p, words, n, first, end);
    float sums[lines_of(gates)][4] = {};
    if (!multiply_row<kind>(sums, weights, source, special, row, left, spins)) return false;
    leave<gates, 8 * tiles>(partial, warp, lane, tile, sums);
  }
  return true;
}

// The sum over all warps for two units of one row.
template <int warps, int gates, int rows>
XP_FN float2 total(const float* partial, int gate, int row, int pair) {
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
