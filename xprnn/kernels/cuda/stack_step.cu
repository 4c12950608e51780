// One step of all layers of a stack in one launch, for a few rows: what stack_steps.py does with
// sequence.step for one layer after the other. Stands behind the cells' headers and lanes.h.
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

// Wait for a word; once `spins`, which count down, are used up it is lost, and NaN.
XP_FN float await_word(const Word* p, Word& spins, bool& lost) {
  for (;;) {
    const Word w = poll(p);
    if (w != EMPTY) return float_of(w);
    if (!spins) {
      lost = true;
      return float_of(NAN_WORD);
    }
    --spins;
    pause();
  }
}

// This lane's share of the products of unit u's rows of the weights (gates*H, K) with all rows of
// v (rows, pitch), which is in shared memory and has zeros past K.
template <int kind, int gates, int rows>
XP_FN void add_products(float (&sums)[gates][rows], const typename Numbers<kind>::Element* weights,
                        int u, int H, int K, const float* v, int pitch) {
  constexpr int per_word = Numbers<kind>::per_word, each = 4 * per_word;  // numbers in 16 bytes
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
XP_KERNEL(32 * STEP_WARPS)
stack_step(const unsigned long long* layers, const float* x,
           const typename Numbers<kind>::Element* h, const float* c,
           typename Numbers<kind>::Element* h_next, float* c_next, float* out, Word* mail,
           Word* other, int blocks, int L, int N, int I, int H, Word spins, Word* report,
           Word tag) {
  typedef typename Numbers<kind>::Element Element;
  constexpr int gates = Unit::gates, threads = 32 * STEP_WARPS;
  XP_SHARED(shared);
  const int pitch_h = (H + 7) / 8 * 8, pitch_x = ((I > H ? I : H) + 7) / 8 * 8;
  float* const old = reinterpret_cast<float*>(shared);  // (rows, pitch_h)
  float* const below = old + rows * pitch_h;            // (rows, pitch_x)
  const int thread = threadIdx.x, lane = thread % 32;
  const int first = blockIdx.y * STEP_WARPS + thread / 32, stride = blocks * STEP_WARPS;
  const Index size = static_cast<Index>(N) * H;  // of a layer's state

  bool lost = false;
  for (Index i = blockIdx.y * threads + thread; i < (L - 1) * size; i += blocks * threads)
    other[i] = EMPTY;

  for (int layer = 0; layer < L; ++layer) {
    const int K = layer ? H : I;
    const unsigned long long* const given = layers + 4 * layer;
    const Element* const weight_ih = reinterpret_cast<const Element*>(given[0]);
    const Element* const weight_hh = reinterpret_cast<const Element*>(given[1]);
    const float* const bias_ih = reinterpret_cast<const float*>(given[2]);
    const float* const bias_hh = reinterpret_cast<const float*>(given[3]);

    sync_block();  // nobody reads any more what was put there for the layer below
    for (int i = thread; i < rows * pitch_h; i += threads) {
      const int row = i / pitch_h, k = i % pitch_h;
      old[i] = row < N && k < H ? number<kind>(h[layer * size + row * H + k]) : 0;
    }
    sync_block();
    float from_old[gates][rows], from_below[gates][rows];
    clear(from_old);
    if (first < H)  // while the layer below is on its way
      add_products<kind>(from_old, weight_hh, first, H, H, old, pitch_h);

    for (int i = thread; i < rows * pitch_x; i += threads) {
      const int row = i / pitch_x, k = i % pitch_x;
      float v = 0;
      if (row < N && k < K)
        v = layer ? await_word(mail + (layer - 1) * size + row * H + k, spins, lost)
                  : number<kind>(stored<kind>(x[row * I + k]));
      below[i] = v;
    }
    if (lost) tell_host(report, tag + layer);
    sync_block();

    for (int u = first; u < H; u += stride) {
      if (u != first) {
        clear(from_old);
        add_products<kind>(from_old, weight_hh, u, H, H, old, pitch_h);
      }
      clear(from_below);
      add_products<kind>(from_below, weight_ih, u, H, K, below, pitch_x);
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
      const Word w = stored<kind>(Unit::step(gx, gh, old[lane * pitch_h + u], second));
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
