// What a thread of a sequence kernel does by element: it has two hidden units of some rows. Stands
// behind products.h, in front of forward.h or backward.h.

namespace xprnn {

template <int kind>
struct Units {
  typedef typename Numbers<kind>::Element Element;
  const int H, u;           // u: the first of the two units
  const int words, u_word;  // of H numbers in the mailbox: all, and where u stands

  XP_FN explicit Units(int H_)
      : H(H_), u(blockIdx.x * UNITS + threadIdx.x % PAIRS * 2), words(padded_words<kind>(H_)),
        u_word(u / Numbers<kind>::per_word) {}
  XP_FN bool live() const { return u_word < words; }  // past H the mailbox gets zeros
  XP_FN bool both() const { return u + 1 < H; }

  // Of the H numbers of a row; u < H
  XP_FN Pair<kind> read(const Element* row) const {
    return load_pair<kind>(row + u, H % 2 == 0, both());
  }
  XP_FN void write(Element* row, float2 v) const {
    store_pair<kind>(row + u, v, H % 2 == 0, both());
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
  // `row` is one of the mailbox
  XP_FN void publish(Word* row, float2 v) const {
    if (u >= H) v.x = 0;  // whatever came of it: others multiply it by 0, and NaN stays NaN
    if (!both()) v.y = 0;
    publish_pair<kind>(row + u_word, v);
  }
};

XP_FN float2 not_a_number() {
  float2 nan;
  nan.x = nan.y = float_of(NAN_WORD);
  return nan;
}

}  // namespace xprnn
