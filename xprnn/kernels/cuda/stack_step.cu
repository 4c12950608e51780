// One step of all layers of a stack in one launch, for a few rows: loop.layer_step for one layer
// after the other, as in engine/step.py. Included after the cells' headers and lanes.h.
//
// The time is bound by reading every weight once. Each warp computes one unit at a time, its lanes
// split the unit's rows of the weights, and nothing is kept from step to step. A layer reads
// h_next of the layer below from an exchange buffer as in exchange.h. There are two buffers: each
// step fills the one of the next step with SENTINEL.

namespace xprnn {

constexpr int STEP_WARPS = 4;  // of a block

// One per cell: one element of a step, from the sums of both products with their biases; returns
// h_next.
struct GruUnit {  // cells/gru.py: GRU
  static constexpr int gates = 3;
  static constexpr bool has_c = false;
  XP_FN static float step(const float (&gx)[3], const float (&gh)[3], float h, float&) {
    float r, z, n;
    return gru_step(gx[0], gx[1], gx[2], gh[0], gh[1], gh[2], h, r, z, n);
  }
};
struct LstmUnit {  // cells/lstm.py: LSTM; c is inout: c -> c_next
  static constexpr int gates = 4;
  static constexpr bool has_c = true;
  XP_FN static float step(const float (&gx)[4], const float (&gh)[4], float, float& c) {
    float i, f, g, o, tanh_c, c_next;
    const float h_next = lstm_step(gx[0] + gh[0], gx[1] + gh[1], gx[2] + gh[2], gx[3] + gh[3], c,
                                   i, f, g, o, c_next, tanh_c);
    c = c_next;
    return h_next;
  }
};
template <bool relu>
struct RnnUnit {  // cells/rnn.py: RNN
  static constexpr int gates = 1;
  static constexpr bool has_c = false;
  XP_FN static float step(const float (&gx)[1], const float (&gh)[1], float, float&) {
    return rnn_step<relu>(gx[0], gh[0]);
  }
};

// Conversion of a value to the operand's bits, in the low part of a word, and back.
template <int mode>
XP_FN Word encode(float v) {
  float2 pair;
  pair.x = v;
  pair.y = 0;
  return words_of<mode>(pair).x;
}
template <int mode>
XP_FN float decode(Word w) {
  uint2 pair;
  pair.x = w;
  pair.y = 0;
  return floats_of<mode>(pair).x;
}

// What a thread loads of a matrix: every THREADS-th item from its own on, with IN_FLIGHT loads
// issued before the first result is used. An item is a word, or four words of one row.
constexpr int IN_FLIGHT = 8, THREADS = 32 * STEP_WARPS;

template <class Words>
struct Items {
  Words items[IN_FLIGHT];
  int first, count;  // first item of this batch, and number of items of the matrix

  XP_FN int at(int j) const { return first + j * THREADS; }
  XP_FN bool has(int j) const { return at(j) < count; }
};

XP_FN void poll_items(uint4& w, const Word* exchange, int i) { w = poll4(exchange + 4 * i); }
XP_FN void poll_items(Word& w, const Word* exchange, int i) { w = poll(exchange + i); }
XP_FN bool is_written(uint4 w) {
  return w.x != SENTINEL && w.y != SENTINEL && w.z != SENTINEL && w.w != SENTINEL;
}
XP_FN bool is_written(Word w) { return w != SENTINEL; }

// Waits for a batch of an exchange buffer. `max_polls` counts down over all waits; at 0 the wait
// times out, and what has not arrived remains SENTINEL, which is a NaN.
template <class Words>
XP_FN void await(Items<Words>& batch, const Word* exchange, Word& max_polls, bool& timed_out) {
  for (;;) {
    bool full = true;
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j)
      if (batch.has(j)) poll_items(batch.items[j], exchange, batch.at(j));
#pragma unroll
    for (int j = IN_FLIGHT - 1; j >= 0; --j)  // the last one first, as `await` of exchange.h
      full = full && (!batch.has(j) || is_written(batch.items[j]));
    if (full) return;
    if (!max_polls) {
      timed_out = true;
      return;
    }
    --max_polls;
    pause();
  }
}

// The length of a row of K floats in shared memory, where rows are padded to 32 bytes.
XP_FN int padded(int K) { return (K + 7) / 8 * 8; }

// Copies a matrix (N, K) of floats to shared memory, with zeros as padding; `load` loads a batch.
// to  out (N, K padded)
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
      const int offset = pitch == K ? i : i / K * pitch + i % K;  // divisions are slow
      if (batch.has(j)) *reinterpret_cast<Words*>(to + offset) = batch.items[j];
    }
  }
}

// `fill` with the values of `value_at(i)`, from the caller's arrays.
template <class Value>
XP_FN void fill_from_array(float* to, int N, int K, const Value& value_at) {
  fill<Word>(to, N, K, [&](Items<Word>& batch) {
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j)
      if (batch.has(j)) batch.items[j] = word_of(value_at(batch.at(j)));
  });
}

// `fill` from the exchange buffer of the layer below; in vectors where its rows are aligned.
XP_FN void fill_from_exchange(const Word* exchange, float* to, int N, int K, Word& max_polls,
                              bool& timed_out) {
  if (K % 4 == 0)
    fill<uint4>(to, N, K,
                [&](Items<uint4>& batch) { await(batch, exchange, max_polls, timed_out); });
  else
    fill<Word>(to, N, K,
               [&](Items<Word>& batch) { await(batch, exchange, max_polls, timed_out); });
}

// Reports the layer of a timeout to the host, unless this layer or one below has been reported. (Of
// two simultaneous reports the upper layer's may remain.)
XP_FN void report_lowest(Word* report, Word tag, int layer) {
  const Word reported = load_from_host(report) - tag;
  if (reported > static_cast<Word>(layer)) store_to_host(report, tag + layer);
}

// This lane's share of the products of unit u's rows of the weights with all rows of v. Rows of v
// from N on are undefined, and so are their sums; the other rows are zero past K.
// weights  in (gates*H, K)
// v        in (rows, K padded) shared memory
template <int mode, int gates, int rows>
XP_FN void add_products(float (&sums)[gates][rows], const typename Operand<mode>::Element* weights,
                        int u, int H, int K, const float* v) {
  constexpr int per_word = Operand<mode>::per_word, each = 4 * per_word;  // values in 16 bytes
  const int pitch = padded(K);
  for (int first = threadIdx.x % 32 * each; first < K; first += 32 * each) {
    uint4 w[gates];
#pragma unroll
    for (int g = 0; g < gates; ++g)
      w[g] = load_words<mode>(weights + (static_cast<Index>(g) * H + u) * K, first, K);
#pragma unroll
    for (int part = 0; part < per_word; ++part) {  // 16 bytes of v at a time
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
            const float2 a = floats_of<mode>(pair);
            sums[g][row] += (per_word == 2 && i % 2 ? a.y : a.x) * b[i];
          }
        }
      }
    }
  }
}

// Sums over the warp; each lane receives those of its own row, `own_row`.
template <int gates, int rows>
XP_FN void sum_over_lanes(float (&total)[gates], float (&sums)[gates][rows], int own_row) {
#pragma unroll
  for (int g = 0; g < gates; ++g) {
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int bits = 16; bits; bits /= 2) sums[g][row] += shuffle_xor(sums[g][row], bits);
      if (row == 0 || row == own_row) total[g] = sums[g][row];
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

// Grid (1, blocks): CuPy would shrink a one-dimensional grid. All blocks must be resident. A layer
// that times out, after `max_polls` polls, computes NaN and is reported.
//
// layers         in     (L, 4) addresses: weight_ih (gates*H, K), weight_hh (gates*H, H), then
//                       bias_ih and bias_hh (gates*H,) or null; K is I in the first layer, else H
// x              in     (N, I)
// h, c           in     (L, N, H); c of the LSTM, else null
// h_next, c_next out    (L, N, H)
// out            out    (N, H): h_next of the last layer
// exchange       inout  (L - 1, N, H): SENTINEL -> h_next of all layers but the last
// next_exchange  out    (L - 1, N, H): SENTINEL
template <class Unit, int mode, int rows>
XP_KERNEL(THREADS)
stack_step(const unsigned long long* layers, const float* x,
           const typename Operand<mode>::Element* h, const float* c,
           typename Operand<mode>::Element* h_next, float* c_next, float* out, Word* exchange,
           Word* next_exchange, int blocks, int L, int N, int I, int H, Word max_polls,
           Word* report, Word tag) {
  typedef typename Operand<mode>::Element Element;
  constexpr int gates = Unit::gates;
  XP_SHARED(shared);
  float* const h_rows = reinterpret_cast<float*>(shared);  // (rows, H padded), of which N are used
  float* const x_rows = h_rows + rows * padded(H);         // (rows, K padded): the layer's input
  const int thread = threadIdx.x, lane = thread % 32;
  const int first = blockIdx.y * STEP_WARPS + thread / 32, stride = blocks * STEP_WARPS;
  const Index size = static_cast<Index>(N) * H;  // of a layer's state

  bool timed_out = false;
  for (Index i = blockIdx.y * THREADS + thread; i < (L - 1) * size; i += blocks * THREADS)
    next_exchange[i] = SENTINEL;

  for (int layer = 0; layer < L; ++layer) {
    const int K = layer ? H : I;
    const unsigned long long* const addresses = layers + 4 * layer;
    const Element* const weight_ih = reinterpret_cast<const Element*>(addresses[0]);
    const Element* const weight_hh = reinterpret_cast<const Element*>(addresses[1]);
    const float* const bias_ih = reinterpret_cast<const float*>(addresses[2]);
    const float* const bias_hh = reinterpret_cast<const float*>(addresses[3]);

    sync_block();  // shared memory of the layer below is no longer read
    const Element* const layer_h = h + layer * size;
    fill_from_array(h_rows, N, H, [&](int i) { return decode<mode>(layer_h[i]); });
    sync_block();
    float gh_sums[gates][rows], gx_sums[gates][rows];
    clear(gh_sums);
    if (first < H)  // before waiting for the layer below
      add_products<mode>(gh_sums, weight_hh, first, H, H, h_rows);

    if (layer)
      fill_from_exchange(exchange + (layer - 1) * size, x_rows, N, H, max_polls, timed_out);
    else
      fill_from_array(x_rows, N, I, [&](int i) { return decode<mode>(encode<mode>(x[i])); });
    if (timed_out) report_lowest(report, tag, layer);
    sync_block();

    for (int u = first; u < H; u += stride) {
      if (u != first) {
        clear(gh_sums);
        add_products<mode>(gh_sums, weight_hh, u, H, H, h_rows);
      }
      clear(gx_sums);
      add_products<mode>(gx_sums, weight_ih, u, H, K, x_rows);
      float gx[gates], gh[gates];
      sum_over_lanes(gx, gx_sums, lane);
      sum_over_lanes(gh, gh_sums, lane);
      if (lane >= N) continue;
      if (bias_ih) {
#pragma unroll
        for (int g = 0; g < gates; ++g) {
          gx[g] += bias_ih[g * H + u];
          gh[g] += bias_hh[g * H + u];
        }
      }
      const Index at = layer * size + static_cast<Index>(lane) * H + u;
      float c_u = 0;
      if (Unit::has_c) c_u = c[at];
      const Word w = encode<mode>(Unit::step(gx, gh, h_rows[lane * padded(H) + u], c_u));
      const float v = decode<mode>(w);  // the rounded value; never SENTINEL
      h_next[at] = static_cast<Element>(w);
      if (Unit::has_c) c_next[at] = c_u;
      if (layer == L - 1)
        out[lane * H + u] = v;
      else
        publish(exchange + at, word_of(v));
    }
  }
}

}  // namespace xprnn
