// Math modes of the matrix products and the operands they read: two 16-bit values or one float in a
// 32-bit word. Included after device.h.
//
// A NaN is always stored as NAN_WORD, which differs from SENTINEL, the value of every word of an
// exchange buffer that has not been written.

namespace xprnn {

enum MathMode { BF16, F16, TF32, TF32X3 };  // TF32X3: float32 to full accuracy, in tf32 products

constexpr Word SENTINEL = 0xffffffffu;
constexpr Word NAN_WORD = 0x7fffffffu;

template <int mode>
struct Operand {
  typedef Word Element;
  static constexpr int per_word = 1;
};
template <>
struct Operand<BF16> {
  typedef unsigned short Element;
  static constexpr int per_word = 2;
};
template <>
struct Operand<F16> : Operand<BF16> {};

XP_FN int smaller(int a, int b) { return a < b ? a : b; }

XP_FN bool is_finite(Word w) { return fabsf(float_of(w)) <= 3.402823466e38f; }

XP_FN bool is_finite(uint4 v) {
  return is_finite(v.x) && is_finite(v.y) && is_finite(v.z) && is_finite(v.w);
}

XP_FN bool is_nan(Word w) { return (w & 0x7fffffffu) > 0x7f800000u; }

XP_FN Word canonical_nan(Word w) { return is_nan(w) ? NAN_WORD : w; }

// The words of two values; 16-bit values share the first word.
template <int mode>
XP_FN uint2 words_of(float2 v) {
  uint2 w;
  w.x = w.y = 0;
  if constexpr (mode == BF16) {
    w.x = bf16_pair(v.x, v.y);
  } else if constexpr (mode == F16) {
    w.x = f16_pair(v.x, v.y);
  } else {
    w.x = canonical_nan(word_of(v.x));
    w.y = canonical_nan(word_of(v.y));
  }
  return w;
}

template <int mode>
XP_FN float2 floats_of(uint2 w) {
  if constexpr (mode == F16) {
    return floats_of_f16(w.x);
  } else {
    float2 v;
    v.x = float_of(mode == BF16 ? w.x << 16 : w.x);
    v.y = float_of(mode == BF16 ? w.x & 0xffff0000u : w.y);
    return v;
  }
}

// Two values as stored. They are converted where they are used: a conversion directly after the
// load would wait for it before the next loads are issued.
template <int mode>
struct Pair {
  uint2 words;

  XP_FN float x() const { return floats_of<mode>(words).x; }
  XP_FN float y() const { return floats_of<mode>(words).y; }
};

// Two adjacent values of a caller's array; the second may lie past the end of its row (`both`).
// `even`: the rows have an even length, so that every pair is aligned.
template <int mode>
XP_FN Pair<mode> load_pair(const typename Operand<mode>::Element* p, bool even, bool both) {
  uint2 w;
  w.y = 0;
  if constexpr (Operand<mode>::per_word == 2) {
    if (even)
      w.x = *reinterpret_cast<const Word*>(p);
    else
      w.x = p[0] | (both ? static_cast<Word>(p[1]) << 16 : 0);
  } else {
    if (even) {
      w = *reinterpret_cast<const uint2*>(p);
    } else {
      w.x = p[0];
      if (both) w.y = p[1];
    }
  }
  return {w};
}

template <int mode>
XP_FN void store_pair(typename Operand<mode>::Element* p, float2 v, bool even, bool both) {
  const uint2 w = words_of<mode>(v);
  if constexpr (Operand<mode>::per_word == 2) {
    if (even) {
      *reinterpret_cast<Word*>(p) = w.x;
    } else {
      p[0] = static_cast<unsigned short>(w.x);
      if (both) p[1] = static_cast<unsigned short>(w.x >> 16);
    }
  } else {
    if (even) {
      *reinterpret_cast<uint2*>(p) = w;
    } else {
      p[0] = w.x;
      if (both) p[1] = w.y;
    }
  }
}

// Two adjacent values of an exchange buffer, whose rows are padded to 16 bytes.
template <int mode>
XP_FN Pair<mode> poll_pair(const Word* p) {
  uint2 w;
  w.y = 0;
  if constexpr (Operand<mode>::per_word == 2)
    w.x = poll(p);
  else
    w = poll2(p);
  return {w};
}

template <int mode>
XP_FN void publish_pair(Word* p, float2 v) {
  const uint2 w = words_of<mode>(v);
  if constexpr (Operand<mode>::per_word == 2)
    publish(p, w.x);
  else
    publish2(p, w.x, w.y);
}

// Words of a row of `count` values in an exchange buffer, padded to 16 bytes.
template <int mode>
XP_FN int padded_words(int count) {
  constexpr int per_vector = 4 * Operand<mode>::per_word;
  return (count + per_vector - 1) / per_vector * 4;
}

// 16 bytes of a row of `count` weights from element `first` on; zeros past the end of the row.
template <int mode>
XP_FN uint4 load_words(const typename Operand<mode>::Element* row, int first, int count) {
  constexpr int per_word = Operand<mode>::per_word;
  Word w[4] = {0, 0, 0, 0};
  if (count % (4 * per_word) == 0) {
    if (first >= count) return make_uint4(0, 0, 0, 0);
    const uint4 v = *reinterpret_cast<const uint4*>(row + first);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4 * per_word; ++i)
      if (first + i < count)
        w[i / per_word] |= static_cast<Word>(row[first + i]) << i % per_word * 16;
  }
  if constexpr (per_word == 1) {  // truncated to tf32, a NaN could become an infinity
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = canonical_nan(w[i]);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

}  // namespace xprnn
