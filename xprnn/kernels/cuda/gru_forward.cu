// The GRU, reset after the product, forward over a whole sequence in one launch: the loop of
// sequence.forward with GRU.forward of cells/gru.py. Stands behind gru.h and products.h.

namespace xprnn {

// What a thread does by element: two hidden units of some rows. The arrays are the kernel's.
template <int kind, bool record>
struct GruForward {
  typedef typename Numbers<kind>::Element Element;
  struct Inputs {
    float2 gx[3], h;
  };
  Element *gates, *saved, *states;
  Word* mail;
  const int H, u;           // u: the first of the two units
  const int words, u_word;  // in a row of the mailbox: all, and where u stands
  float2 bias;              // of n

  XP_FN GruForward(const float* bias_hh, Element* gates_, Element* saved_, Element* states_,
                   Word* mail_, int H_)
      : gates(gates_), saved(saved_), states(states_), mail(mail_), H(H_),
        u(blockIdx.x * UNITS + threadIdx.x % PAIRS * 2), words(padded_words<kind>(H_)),
        u_word(u / Numbers<kind>::per_word) {
    bias.x = bias_hh && u < H ? bias_hh[2 * H + u] : 0;
    bias.y = bias_hh && u + 1 < H ? bias_hh[2 * H + u + 1] : 0;
  }
  XP_FN bool live() const { return u_word < words; }  // past H the mailbox gets zeros

  XP_FN void load(Inputs& in, Index before, Index at) const {
    in.h = poll_pair<kind>(mail + before * words + u_word);  // this thread's own, or initial
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      in.gx[gate].x = in.gx[gate].y = 0;
      if (u < H)
        in.gx[gate] = load_pair<kind>(gates + (at * 3 + gate) * H + u, H % 2 == 0, u + 1 < H);
    }
  }
  XP_FN void bring(Index at) const {
    if (u >= H) return;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) prefetch(gates + (at * 3 + gate) * H + u);
  }
  XP_FN void step(const Inputs& in, const float2 (&gh)[3], Index after, Index at) const {
    float2 r, z, n, h, gh_n;
    gh_n.x = gh[2].x + bias.x;
    gh_n.y = gh[2].y + bias.y;
    h.x = gru_step(in.gx[0].x, in.gx[1].x, in.gx[2].x, gh[0].x, gh[1].x, gh_n.x, in.h.x, r.x, z.x,
                   n.x);
    h.y = gru_step(in.gx[0].y, in.gx[1].y, in.gx[2].y, gh[0].y, gh[1].y, gh_n.y, in.h.y, r.y, z.y,
                   n.y);
    put(h, after);
    if (record && u < H) {
      const bool even = H % 2 == 0, both = u + 1 < H;
      store_pair<kind>(gates + at * 3 * H + u, r, even, both);
      store_pair<kind>(gates + (at * 3 + 1) * H + u, z, even, both);
      store_pair<kind>(gates + (at * 3 + 2) * H + u, n, even, both);
      store_pair<kind>(saved + at * H + u, gh_n, even, both);
    }
  }
  XP_FN void put(float2 h, Index row) const {
    if (u >= H) h.x = 0;  // whatever came of it: others multiply it by 0, and NaN stays NaN
    if (u + 1 >= H) h.y = 0;
    publish_pair<kind>(mail + row * words + u_word, h);
    if (u < H && static_cast<void*>(states) != mail)
      store_pair<kind>(states + row * H + u, h, H % 2 == 0, u + 1 < H);
  }
};

// All states of the block's rows and units become NaN, so that nobody waits for them or uses them.
template <int rows, int kind, bool record>
XP_FN void gru_give_up(const GruForward<kind, record>& cell, const Sequence& sequence, int stride,
                       int step) {
  float2 nan;
  nan.x = nan.y = float_of(NAN_WORD);
  if (threadIdx.x == 0) sequence.fail(step);
  if (!cell.live()) return;
  for (Passes at(sequence, rows, false); !at.done(); at.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, at.end - at.first); row += stride)
      cell.put(nan, sequence.after(at.walk) + at.first + row);
}

// Where the weights of the block's units come from; this lane's begin at `word` of each row.
template <int kind>
struct GruWeights {
  const typename Numbers<kind>::Element* weight_hh;
  int H, word;

  XP_FN uint4 operator()(int gate, int row, int piece) const {
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row;
    if (u >= H) return make_uint4(0, 0, 0, 0);
    const auto* weights = weight_hh + static_cast<Index>(gate * H + u) * H;
    return load_words<kind>(weights, (word + piece * PIECE) * Numbers<kind>::per_word, H);
  }
};

// Each block has 16 hidden units of the rows of one group, all three gates: grid (units, groups).
// Its warps share out the reduction over h; the sums then go to the threads, by element.
//
// weight_hh (3*H, H) read; bias_hh (3*H,) or null: n's part is read
// gates     (S, 3*H) read as gx; with `record` then = r z n
// saved     (S, H) with `record` = gh_n, else not touched
// states    (N + S, H) the initial rows read, others =
// mail      (N + S, H padded) `states` or apart from it; initial rows read, others, EMPTY, =
// The rest is in `Sequence`; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles, bool record>
XP_KERNEL(32 * warps)
gru_forward(const typename Numbers<kind>::Element* weight_hh, const float* bias_hh,
            typename Numbers<kind>::Element* gates, typename Numbers<kind>::Element* saved,
            typename Numbers<kind>::Element* states, Word* mail, const int* counts, int T, int N,
            int H, int S, int passes, int reverse, Word spins, Word* report, Word tag) {
  constexpr int rows = 8 * tiles, stride = 32 * warps / PAIRS, partials = warps * 3 * rows * PITCH;
  constexpr int most = (rows + stride - 1) / stride;  // rows of a thread in a pass
  XP_SHARED(shared);
  Word* const stop = reinterpret_cast<Word*>(shared);              // by the parity of the pass,
  float* const partial = reinterpret_cast<float*>(shared + HEAD);  // as are the partial sums
  uint4* const rest = reinterpret_cast<uint4*>(partial + 2 * partials);

  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  const GruForward<kind, record> cell(bias_hh, gates, saved, states, mail, H);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int word = warp * chunks * PIECE + lane % 4 * 4;  // where this lane's share of h begins
  Fragments<chunks, held> weights[3];
  const GruWeights<kind> source = {weight_hh, H, word};
  const bool special = !load_weights(weights, rest + warp * 3 * weights[0].rest_of_warp(), source);
  if (thread < 2) stop[thread] = 0;
  sync_block();

  int turn = 0;
  for (Passes at(sequence, rows, false); !at.done(); at.next(), turn ^= 1) {
    const Index before = sequence.before(at.walk), after = sequence.after(at.walk);
    typename GruForward<kind, record>::Inputs in[most];
    const int row = thread / PAIRS, mine = cell.live() ? smaller(at.end - at.first, rows) : 0;
#pragma unroll
    for (int i = 0; i < most; ++i) {  // on their way while the others are waited for
      const int n = at.first + row + i * stride;
      if (row + i * stride < mine) cell.load(in[i], before + n, at.walk.at + n);
      if (row + i * stride < mine && n < at.walk.next_rows) cell.bring(at.walk.next_at + n);
    }
    float* const sums = partial + turn * partials;
    const Word* const h = mail + before * cell.words + word;
    if (!multiply_pass<kind, tiles>(sums, weights, source, special, h, cell.words,
                                    cell.words - word, at.first, at.end, spins))
      stop[turn] = 1;
    sync_block();
    if (stop[turn]) {
      gru_give_up<rows>(cell, sequence, stride, at.walk.step);
      return;
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int n = at.first + row + i * stride;
      if (row + i * stride >= mine) continue;
      float2 gh[3];
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
        gh[gate] = total<warps, 3, rows>(sums, gate, row + i * stride, thread % PAIRS);
      cell.step(in[i], gh, after + n, at.walk.at + n);
    }
  }
}

}  // namespace xprnn
