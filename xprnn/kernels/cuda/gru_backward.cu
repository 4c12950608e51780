// The GRU, reset after the product, backward over a whole sequence in one launch: the loop of
// sequence.backward with GRU.backward of cells/gru.py. Stands behind gru.h and products.h.

namespace xprnn {

// What a thread does by element: two hidden units of some rows. The arrays are the kernel's.
template <int kind>
struct GruBackward {
  typedef typename Numbers<kind>::Element Element;
  struct Inputs {
    float2 r, z, n, gh_n, h, doutput;
  };
  const Element* states;
  const float* doutput;
  const int doutput_stride;
  Element *gates, *saved;
  Word* mail;
  const int H, u;           // u: the first of the two units
  const int words, u_word;  // in a gate's part of a row of the mailbox: all, and where u stands

  XP_FN GruBackward(const Element* states_, const float* doutput_, int doutput_stride_,
                    Element* gates_, Element* saved_, Word* mail_, int H_)
      : states(states_), doutput(doutput_), doutput_stride(doutput_stride_), gates(gates_),
        saved(saved_), mail(mail_), H(H_), u(blockIdx.x * UNITS + threadIdx.x % PAIRS * 2),
        words(padded_words<kind>(H_)), u_word(u / Numbers<kind>::per_word) {}
  XP_FN bool live() const { return u_word < words; }  // past H the mailbox gets zeros
  XP_FN bool both() const { return u + 1 < H; }

  XP_FN float2 read(const Element* p) const { return load_pair<kind>(p, H % 2 == 0, both()); }

  XP_FN void load(Inputs& in, Index before, Index at) const {
    in = Inputs();
    if (u >= H) return;
    const Element* const gate = gates + at * 3 * H + u;
    in.r = read(gate);
    in.z = read(gate + H);
    in.n = read(gate + 2 * H);
    in.gh_n = read(saved + at * H + u);
    in.h = read(states + before * H + u);
    if (!doutput) return;
    const float* const d = doutput + at * doutput_stride + u;
    in.doutput.x = d[0];
    if (both()) in.doutput.y = d[1];
  }
  // Publishes dgh; returns the part of dh that does not go through the product.
  XP_FN float2 step(const Inputs& in, float2 dh, Index at) const {
    float2 dgh_r, dgh_z, dgx_n, dgh_n, direct;
    direct.x = gru_step_backward(dh.x + in.doutput.x, in.r.x, in.z.x, in.n.x, in.gh_n.x, in.h.x,
                                 dgh_r.x, dgh_z.x, dgx_n.x, dgh_n.x);
    direct.y = gru_step_backward(dh.y + in.doutput.y, in.r.y, in.z.y, in.n.y, in.gh_n.y, in.h.y,
                                 dgh_r.y, dgh_z.y, dgx_n.y, dgh_n.y);
    put(dgh_r, dgh_z, dgh_n, dgx_n, at);
    return direct;
  }
  XP_FN void put(float2 r, float2 z, float2 n, float2 dgx_n, Index at) const {
    publish_gate(r, at, 0);
    publish_gate(z, at, 1);
    publish_gate(n, at, 2);
    if (u >= H) return;
    Element* const gate = gates + at * 3 * H + u;
    store_pair<kind>(gate, r, H % 2 == 0, both());
    store_pair<kind>(gate + H, z, H % 2 == 0, both());
    store_pair<kind>(gate + 2 * H, n, H % 2 == 0, both());
    store_pair<kind>(saved + at * H + u, dgx_n, H % 2 == 0, both());
  }
  XP_FN void publish_gate(float2 v, Index at, int gate) const {
    if (u >= H) v.x = 0;  // whatever came of it: others multiply it by 0, and NaN stays NaN
    if (!both()) v.y = 0;
    publish_pair<kind>(mail + (at * 3 + gate) * words + u_word, v);
  }
};

// Where the weights of the block's units come from: columns of W_hh, gate after gate. This lane's
// begin at `word` of such a column, in which each gate has `words`.
template <int kind>
struct GruColumns {
  const typename Numbers<kind>::Element* weight_hh;
  int H, words, word;

  XP_FN uint4 operator()(int, int row, int piece) const {
    constexpr int per_word = Numbers<kind>::per_word;
    const int u = blockIdx.x * UNITS + threadIdx.x % 32 / 4 + row, at = word + piece * PIECE;
    const int gate = at / words, first = at % words * per_word;
    Word w[4] = {0, 0, 0, 0};
    if (u >= H || gate >= 3) return make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4 * per_word; ++i)
      if (first + i < H) {
        const Index place = static_cast<Index>(gate * H + first + i) * H + u;
        w[i / per_word] |= static_cast<Word>(weight_hh[place]) << i % per_word * 16;
      }
    if constexpr (per_word == 1) {  // as in load_words
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = quiet(w[i]);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// dh of a thread's units and rows between the steps, in shared memory: a place for each row of the
// group, which no other thread reads. `move` takes it from dstates, or puts it there at the end.
struct Carried {
  float2* place;  // of the group's first row
  int begin, end, H, u;

  XP_FN float2& of(int n) const { return place[(n - begin) * PAIRS]; }
  template <int rows, int stride>
  XP_FN void move(float* dstates, bool back) const {
    for (int first = begin; first < end; first += rows)
      for (int row = threadIdx.x / PAIRS; row < smaller(rows, end - first); row += stride) {
        float2& dh = of(first + row);
        if (!back) dh.x = dh.y = 0;
        if (u < H) exchange(dh.x, dstates[static_cast<Index>(first + row) * H + u], back);
        if (u + 1 < H) exchange(dh.y, dstates[static_cast<Index>(first + row) * H + u + 1], back);
      }
  }
  XP_FN static void exchange(float& here, float& there, bool back) {
    if (back)
      there = here;
    else
      here = there;
  }
};

// All that the block should have written becomes NaN, so that nobody waits for it or uses it.
template <int kind, int rows, int stride>
XP_FN void gru_give_up(const GruBackward<kind>& cell, const Carried& carried, float* dstates,
                       const Sequence& sequence, int step) {
  float2 nan;
  nan.x = nan.y = float_of(NAN_WORD);
  if (threadIdx.x == 0) sequence.fail(step);
  if (!cell.live()) return;
  for (Passes at(sequence, rows, true); !at.done(); at.next())
    for (int row = threadIdx.x / PAIRS; row < smaller(rows, at.end - at.first); row += stride) {
      carried.of(at.first + row) = nan;
      cell.put(nan, nan, nan, nan, at.walk.at + at.first + row);
    }
  carried.move<rows, stride>(dstates, true);
}

// Each block has 16 hidden units of the rows of one group: grid (units, groups). Its threads take
// the gates by element, its warps share out the reduction over the dgh of all blocks.
//
// weight_hh (3*H, H) read
// states    (N + S, H) read
// doutput   (S, H), rows `doutput_stride` apart, or null for zeros; read
// gates     (S, 3*H) read as r z n, then = dgh; saved (S, H) read as gh_n, then = dgx_n
// dstates   (N, H) read as dh of the final states, then = dh of the initial ones
// mail      (S, 3, H padded) EMPTY, =
// The rest is in `Sequence`, as the forward pass had it; a pass has 8 * tiles rows.
template <int kind, int warps, int chunks, int held, int tiles>
XP_KERNEL(32 * warps)
gru_backward(const typename Numbers<kind>::Element* weight_hh,
             const typename Numbers<kind>::Element* states, const float* doutput,
             typename Numbers<kind>::Element* gates, typename Numbers<kind>::Element* saved,
             float* dstates, Word* mail, const int* counts, int T, int N, int H, int S, int passes,
             int reverse, int doutput_stride, Word spins, Word* report, Word tag) {
  constexpr int rows = 8 * tiles, stride = 32 * warps / PAIRS, partials = warps * rows * PITCH;
  constexpr int most = (rows + stride - 1) / stride;  // rows of a thread in a pass
  XP_SHARED(shared);
  Word* const stop = reinterpret_cast<Word*>(shared);              // by the parity of the pass,
  float* const partial = reinterpret_cast<float*>(shared + HEAD);  // as are the partial sums
  uint4* const rest = reinterpret_cast<uint4*>(partial + 2 * partials);

  const Sequence sequence = {counts, T, N, S, passes, reverse, spins, report, tag};
  const GruBackward<kind> cell(states, doutput, doutput_stride, gates, saved, mail, H);
  const int thread = threadIdx.x, warp = thread / 32;
  const int word = warp * chunks * PIECE + thread % 4 * 4;  // where this lane's share begins
  Fragments<chunks, held> weights[1];
  const int apart = weights[0].rest_of_warp(), begin = blockIdx.y * rows * passes;
  const GruColumns<kind> source = {weight_hh, H, cell.words, word};
  const bool special = !load_weights(weights, rest + warp * apart, source);
  float2* const place = reinterpret_cast<float2*>(rest + warps * apart) + thread % PAIRS;
  const Carried carried = {place, begin, smaller(begin + rows * passes, N), H, cell.u};
  carried.move<rows, stride>(dstates, false);
  if (thread < 2) stop[thread] = 0;
  sync_block();

  typename GruBackward<kind>::Inputs in[most];
  const auto load = [&](const Passes& at) {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = at.first + row;
      if (row < rows && n < at.end) cell.load(in[i], sequence.before(at.walk) + n, at.walk.at + n);
    }
  };
  Passes at(sequence, rows, true);
  if (!at.done()) load(at);
  for (int turn = 0; !at.done(); turn ^= 1) {
    const int first = at.first, end = at.end, step = at.walk.step;
    const Index block = at.walk.at;
    float2 direct[most] = {};
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row < rows && n < end && cell.live())
        direct[i] = cell.step(in[i], carried.of(n), block + n);
    }
    at.next();
    if (!at.done()) load(at);  // on their way while the others are waited for
    float* const sums = partial + turn * partials;
    const Word* const dgh = mail + block * 3 * cell.words + word;
    if (!multiply_pass<kind, tiles>(sums, weights, source, special, dgh, 3 * cell.words,
                                    3 * cell.words - word, first, end, spins))
      stop[turn] = 1;
    sync_block();
    if (stop[turn]) {
      gru_give_up<kind, rows, stride>(cell, carried, dstates, sequence, step);
      return;
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = thread / PAIRS + i * stride, n = first + row;
      if (row >= rows || n >= end || !cell.live()) continue;
      const float2 sum = total<warps, 1, rows>(sums, 0, row, thread % PAIRS);
      carried.of(n).x = direct[i].x + sum.x;
      carried.of(n).y = direct[i].y + sum.y;
    }
  }
  carried.move<rows, stride>(dstates, true);
}

}  // namespace xprnn
