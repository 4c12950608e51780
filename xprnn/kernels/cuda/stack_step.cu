// One step of all layers of a stack in one launch, for a few rows: what step.py does with
// loop.layer_step for one layer after the other. Stands behind the cells' headers and lanes.h.
//
// What bounds it is reading every weight once, so a warp takes a unit at a time, its lanes share
// the unit's rows of the weights, and nothing is kept from step to step. A layer reads h' of the
// layer below from a mailbox as exchange.h describes one. There are two: the step after this one
// finds its own empty, because this one has emptied it.

namespace xprnn {

constexpr int STEP_WARPS = 4;  // of a block

// Each cell: one element of a step, from the sums of both sides with their biases; returns h'.
struct GruUnit {  // cells/gru.py: GRU
  static constexpr int gates = 3;
  static constexpr bool second = false;
  XP_FN static float step(const float (&gx)[3], const float (&gh)[3], float h, float&) {
    float r, z, n;
    return gru_step(gx[0], gx[1], gx[2], gh[0], gh[1], gh[2], h, r, z, n);
  }
};
struct LstmUnit {  // cells/lstm.py: LSTM; c becomes c'
  static constexpr int gates = 4;
  static constexpr bool second = true;
  XP_FN static float step(const float (&gx)[4], const float (&gh)[4], float, float& c) {
    float i, f, g, o, tanh_c, c_next;
    const float h = lstm_step(gx[0] + gh[0], gx[1] + gh[1], gx[2] + gh[2], gx[3] + gh[3], c, i, f,
                              g, o, c_next, tanh_c);
    c = c_next;
    return h;
  }
};
template <bool relu>
struct RnnUnit {  // cells/rnn.py: RNN
  static constexpr int gates = 1;
  static constexpr bool second = false;
  XP_FN static float step(const float (&gx)[1], const float (&gh)[1], float, float&) {
    return rnn_step<relu>(gx[0], gh[0]);
  }
};

// A number as it is stored, in the low bits of a word, and back.
template <int kind>
XP_FN Word stored(float v) {
  float2 pair;
  pair.x = v;
  pair.y = 0;
  return words_of<kind>(pair).x;
}
template <int kind>
XP_FN float number(Word w) {
  uint2 pair;
  pair.x = w;
  pair.y = 0;
  return floats_of<kind>(pair).x;
}

// What a thread loads of a matrix: every THREADS-th item from its own on, IN_FLIGHT of them on
// their way before the first is looked at. An item is a word, or four that stand in one row.
constexpr int IN_FLIGHT = 8, THREADS = 32 * STEP_WARPS;

template <class Words>
struct Items {
  Words items[IN_FLIGHT];
  int first, count;  // of the matrix: this batch's first item, and all there are

  XP_FN int at(int j) const { return first + j * THREADS; }
  XP_FN bool has(int j) const { return at(j) < count; }
};

XP_FN void poll_items(uint4& w, const Word* mail, int i) { w = poll4(mail + 4 * i); }
XP_FN void poll_items(Word& w, const Word* mail, int i) { w = poll(mail + i); }
XP_FN bool is_there(uint4 w) {
  return w.x != EMPTY && w.y != EMPTY && w.z != EMPTY && w.w != EMPTY;
}
XP_FN bool is_there(Word w) { return w != EMPTY; }

// Wait for a batch of a mailbox; once `spins`, which count down, are used up what is not there is
// lost, and stays EMPTY, which is a NaN.
template <class Words>
XP_FN void await(Items<Words>& batch, const Word* mail, Word& spins, bool& lost) {
  for (;;) {
    bool full = true;
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j)
      if (batch.has(j)) poll_items(batch.items[j], mail, batch.at(j));
#pragma unroll
    for (int j = IN_FLIGHT - 1; j >= 0; --j)  // the last one first, as `await` of exchange.h
      full = full && (!batch.has(j) || is_there(batch.items[j]));
    if (full) return;
    if (!spins) {
      lost = true;
      return;
    }
    --spins;
    pause();
  }
}

// The length of a row of K floats in shared memory, where every row begins at 32 bytes.
XP_FN int padded(int K) { return (K + 7) / 8 * 8; }

// to (N, K padded) in shared memory = a matrix (N, K) of floats, zeros behind; `load` gives a batch.
template <class Words, class Load>
XP_FN void fill(float* to, int N, int K, const Load& load) {
  constexpr int width = sizeof(Words) / sizeof(Word);
  const int pitch = padded(K);
  for (int row = threadIdx.x; row < N; row += THREADS)
    for (int k = K; k < pitch; ++k) to[row * pitch + k] = 0;
  Items<Words> batch;
  batch.count = N * K / width;
  for (batch.first = threadIdx.x; batch.first < batch.count; batch.first += IN_FLIGHT * THREADS) {
    load(batch);
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j) {
      const int i = batch.at(j) * width;
      const int place = pitch == K ? i : i / K * pitch + i % K;  // a division takes long
      if (batch.has(j)) *reinterpret_cast<Words*>(to + place) = batch.items[j];
    }
  }
}

// `fill` with what `number_at(i)` gives, of the caller's arrays.
template <class Number>
XP_FN void fill_at_once(float* to, int N, int K, const Number& number_at) {
  fill<Word>(to, N, K, [&](Items<Word>& batch) {
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j)
      if (batch.has(j)) batch.items[j] = word_of(number_at(batch.at(j)));
  });
}

// `fill` with what comes from the layer below, its rows in vectors where they stand on such.
XP_FN void fill_from(const Word* mail, float* to, int N, int K, Word& spins, bool& lost) {
  if (K % 4 == 0)
    fill<uint4>(to, N, K, [&](Items<uint4>& batch) { await(batch, mail, spins, lost); });
  else
    fill<Word>(to, N, K, [&](Items<Word>& batch) { await(batch, mail, spins, lost); });
}

// Tells the host of a layer whose wait was given up, unless it knows of this one or one below. (Of
// two blocks at the same moment it may be told the upper one's.)
XP_FN void tell_first(Word* report, Word tag, int layer) {
  const Word known = told_host(report) - tag;
  if (known > static_cast<Word>(layer)) tell_host(report, tag + layer);
}

// This lane's share of the products of unit u's rows of the weights (gates*H, K) with all rows of
// v (rows, K padded), which is in shared memory; of a row that is there, zeros past K. What the sums
// of other rows are does not matter.
template <int kind, int gates, int rows>
XP_FN void add_products(float (&sums)[gates][rows], const typename Numbers<kind>::Element* weights,
                        int u, int H, int K, const float* v) {
  constexpr int per_word = Numbers<kind>::per_word, each = 4 * per_word;  // numbers in 16 bytes
  const int pitch = padded(K);
  for (int first = threadIdx.x % 32 * each; first < K; first += 32 * each) {
    uint4 w[gates];
#pragma unroll
    for (int g = 0; g < gates; ++g)
      w[g] = load_words<kind>(weights + (static_cast<Index>(g) * H + u) * K, first, K);
#pragma unroll
    for (int part = 0; part < per_word; ++part) {  // of v, 16 bytes at a time
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const uint4 q = *reinterpret_cast<const uint4*>(v + row * pitch + first + 4 * part);
#pragma unroll
        for (int g = 0; g < gates; ++g) {
          const Word word[4] = {w[g].x, w[g].y, w[g].z, w[g].w};
          const float b[4] = {float_of(q.x), float_of(q.y), float_of(q.z), float_of(q.w)};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint2 pair;
            pair.x = word[per_word == 2 ? 2 * part + i / 2 : i];
            pair.y = 0;
            const float2 a = floats_of<kind>(pair);
            sums[g][row] += (per_word == 2 && i % 2 ? a.y : a.x) * b[i];
          }
        }
      }
    }
  }
}

// The sums over the warp of row `mine`, in every lane for its own.
template <int gates, int rows>
XP_FN void total_of(float (&total)[gates], float (&sums)[gates][rows], int mine) {
#pragma unroll
  for (int g = 0; g < gates; ++g) {
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int bits = 16; bits; bits /= 2) sums[g][row] += across(sums[g][row], bits);
      if (row == 0 || row == mine) total[g] = sums[g][row];
    }
  }
}

template <int gates, int rows>
XP_FN void clear(float (&sums)[gates][rows]) {
#pragma unroll
  for (int g = 0; g < gates; ++g)
#pragma unroll
    for (int row = 0; row < rows; ++row) sums[g][row] = 0;
}

// Grid (1, blocks): CuPy would shrink one of one dimension. All blocks are resident.
//
// layers  (L, 4) addresses, read: weight_ih (gates*H, K), weight_hh (gates*H, H), then bias_ih and
//         bias_hh (gates*H,) or null; K is I in the first layer, else H
// x       (N, I) read
// h, c    (L, N, H) read; c, of the LSTM alone, else null
// h_next, c_next (L, N, H) =
// out     (N, H) = h_next of the last layer
// mail    (L - 1, N, H) EMPTY, then = h_next of all layers but the last; other, as large, = EMPTY
// A wait that takes more than `spins` polls is given up: what hangs on it is NaN, and it is told.
template <class Unit, int kind, int rows>
XP_KERNEL(THREADS)
stack_step(const unsigned long long* layers, const float* x,
           const typename Numbers<kind>::Element* h, const float* c,
           typename Numbers<kind>::Element* h_next, float* c_next, float* out, Word* mail,
           Word* other, int blocks, int L, int N, int I, int H, Word spins, Word* report,
           Word tag) {
  typedef typename Numbers<kind>::Element Element;
  constexpr int gates = Unit::gates;
  XP_SHARED(shared);
  float* const old = reinterpret_cast<float*>(shared);  // (rows, H padded), of which N are there
  float* const below = old + rows * padded(H);          // (rows, K padded)
  const int thread = threadIdx.x, lane = thread % 32;
  const int first = blockIdx.y * STEP_WARPS + thread / 32, stride = blocks * STEP_WARPS;
  const Index size = static_cast<Index>(N) * H;  // of a layer's state

  bool lost = false;
  for (Index i = blockIdx.y * THREADS + thread; i < (L - 1) * size; i += blocks * THREADS)
    other[i] = EMPTY;

  for (int layer = 0; layer < L; ++layer) {
    const int K = layer ? H : I;
    const unsigned long long* const given = layers + 4 * layer;
    const Element* const weight_ih = reinterpret_cast<const Element*>(given[0]);
    const Element* const weight_hh = reinterpret_cast<const Element*>(given[1]);
    const float* const bias_ih = reinterpret_cast<const float*>(given[2]);
    const float* const bias_hh = reinterpret_cast<const float*>(given[3]);

    sync_block();  // nobody reads any more what was put there for the layer below
    const Element* const here = h + layer * size;
    fill_at_once(old, N, H, [&](int i) { return number<kind>(here[i]); });
    sync_block();
    float from_old[gates][rows], from_below[gates][rows];
    clear(from_old);
    if (first < H)  // while the layer below is on its way
      add_products<kind>(from_old, weight_hh, first, H, H, old);

    if (layer)
      fill_from(mail + (layer - 1) * size, below, N, H, spins, lost);
    else
      fill_at_once(below, N, I, [&](int i) { return number<kind>(stored<kind>(x[i])); });
    if (lost) tell_first(report, tag, layer);
    sync_block();

    for (int u = first; u < H; u += stride) {
      if (u != first) {
        clear(from_old);
        add_products<kind>(from_old, weight_hh, u, H, H, old);
      }
      clear(from_below);
      add_products<kind>(from_below, weight_ih, u, H, K, below);
      float gx[gates], gh[gates];
      total_of(gx, from_below, lane);
      total_of(gh, from_old, lane);
      if (lane >= N) continue;
      if (bias_ih) {
#pragma unroll
        for (int g = 0; g < gates; ++g) {
          gx[g] += bias_ih[g * H + u];
          gh[g] += bias_hh[g * H + u];
        }
      }
      const Index at = layer * size + static_cast<Index>(lane) * H + u;
      float second = 0;
      if (Unit::second) second = c[at];
      const Word w = stored<kind>(Unit::step(gx, gh, old[lane * padded(H) + u], second));
      const float v = number<kind>(w);  // as it is stored, so not EMPTY
      h_next[at] = static_cast<Element>(w);
      if (Unit::second) c_next[at] = second;
      if (layer == L - 1)
        out[lane * H + u] = v;
      else
        publish(mail + at, word_of(v));
    }
  }
}

}  // namespace xprnn
