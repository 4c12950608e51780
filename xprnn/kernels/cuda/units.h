// Elementwise accesses of a thread of a sequence kernel, which owns two adjacent hidden units of
// some rows. Included after products.h and before forward.h or backward.h.

namespace xprnn {

template <int mode>
struct Units {
  typedef typename Operand<mode>::Element Element;
  const int H, u;           // u: the first of the two units
  const int words, u_word;  // words of an exchange row of H values, and the word of unit u

  XP_FN explicit Units(int H_)
      : H(H_), u(blockIdx.x * UNITS + threadIdx.x % PAIRS * 2), words(padded_words<mode>(H_)),
        u_word(u / Operand<mode>::per_word) {}
  XP_FN bool live() const { return u_word < words; }  // includes the padding, which is zeroed
  XP_FN bool both() const { return u + 1 < H; }

  // Access to a row of H values; u < H
  XP_FN Pair<mode> read(const Element* row) const {
    return load_pair<mode>(row + u, H % 2 == 0, both());
  }
  XP_FN void write(Element* row, float2 v) const {
    store_pair<mode>(row + u, v, H % 2 == 0, both());
  }
  XP_FN float2 read(const float* row) const {
    float2 v;
    v.x = row[u];
    v.y = both() ? row[u + 1] : 0;
    return v;
  }
  XP_FN void write(float* row, float2 v) const {
    row[u] = v.x;
    if (both()) row[u + 1] = v.y;
  }
  // `row`: of an exchange buffer
  XP_FN void publish(Word* row, float2 v) const {
    if (u >= H) v.x = 0;  // padding must be 0: products multiply it by 0, and a NaN would persist
    if (!both()) v.y = 0;
    publish_pair<mode>(row + u_word, v);
  }
};

XP_FN float2 nan_pair() {
  float2 nan;
  nan.x = nan.y = float_of(NAN_WORD);
  return nan;
}

}  // namespace xprnn
