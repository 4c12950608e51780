// kernels/cuda/device.h for the emulator; included after emulator.h and clusters.h.

#define threadIdx (emulator::current->thread_index)
#define blockIdx (emulator::current->block_index)
#define XP_KERNEL(threads) void
#define XP_SHARED(name) unsigned char* const name = emulator::current->parent->shared.data()

namespace xprnn {

typedef unsigned int Word;

inline void sync_block() { emulator::barrier(); }
inline bool all_lanes(bool p) {
  const unsigned own = p;
  const auto all = emulator::collect(1, &own, 1);
  for (int lane = 0; lane < 32; ++lane)
    if (!all[lane][0]) return false;
  return true;
}
inline void pause() { emulator::poll_again(); }
inline void sync_warp() {
  const unsigned nothing = 0;
  emulator::collect(5, &nothing, 1);
}

struct Barrier {
  unsigned long long bits;
};
typedef unsigned char* Remote;

inline unsigned cluster_rank() { return emulator::current->parent->rank; }
inline void sync_cluster() { emulator::cluster_barrier(); }
inline Remote at_rank(const void* p, unsigned rank) { return emulator::at_rank(p, rank); }
inline void send4(Remote to, uint4 v, Remote barrier) { emulator::send_words(to, v, barrier); }
inline unsigned char* bytes_of(Barrier* barrier) {
  return reinterpret_cast<unsigned char*>(barrier);
}
inline void init(Barrier* barrier, unsigned count) {
  emulator::init_mbarrier(bytes_of(barrier), count);
}
inline void fence_barrier_init() {}
inline void expect(Barrier* barrier, Word bytes) {
  emulator::expect_bytes(bytes_of(barrier), bytes);
}
inline void arrive(Remote barrier) { emulator::send_arrival(barrier); }
inline bool ended(Barrier* barrier, Word parity) {
  return emulator::phase_ended(bytes_of(barrier), parity);
}
inline float float_of(Word w) {
  float a;
  memcpy(&a, &w, sizeof a);
  return a;
}
inline Word word_of(float a) {
  Word w;
  memcpy(&w, &a, sizeof w);
  return w;
}
inline Word opaque(Word w) { return w; }
inline float zero_after(float) { return 0; }
inline uint4 poll4(const Word* p) {
  emulator::aligned(p, 16);
  return {emulator::load(p), emulator::load(p + 1), emulator::load(p + 2), emulator::load(p + 3)};
}
inline uint2 poll2(const Word* p) {
  emulator::aligned(p, 8);
  return {emulator::load(p), emulator::load(p + 1)};
}
inline Word poll(const Word* p) {
  emulator::aligned(p, 4);
  return emulator::load(p);
}
inline void publish(Word* p, Word v) {
  emulator::aligned(p, 4);
  emulator::store_later(p, v);
}
inline void publish2(Word* p, Word v, Word w) {
  emulator::aligned(p, 8);
  emulator::store_later(p, v);
  emulator::store_later(p + 1, w);
}
inline void store_to_host(Word* p, Word v) { *p = v; }
inline Word load_from_host(const Word* p) { return *p; }
inline void prefetch(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }

inline Word bf16_of(float a) {
  const Word w = word_of(a);
  return a != a ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}
inline Word bf16_pair(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline Word f16_of(float a) {
  const _Float16 rounded = static_cast<_Float16>(a);
  unsigned short w;
  memcpy(&w, &rounded, sizeof w);
  return a != a ? 0x7fff : w;
}
inline Word f16_pair(float low, float high) { return f16_of(low) | f16_of(high) << 16; }
inline float2 floats_of_f16(Word w) {
  _Float16 v[2];
  memcpy(v, &w, sizeof v);
  return {static_cast<float>(v[0]), static_cast<float>(v[1])};
}

// c plus exact products, summed as by tensor cores: all terms are rounded toward zero to two bits
// beyond those of the largest one, and their sum is rounded toward zero to float. (M. Fasi, N. J.
// Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
// Science 7:e330, 2021.)
template <int count>
float truncated_sum(float c, const double (&products)[count]) {
  double largest = std::fabs(c);
  bool finite = std::isfinite(c);
  for (double p : products) {
    finite = finite && std::isfinite(p);
    largest = std::fmax(largest, std::fabs(p));
  }
  if (!finite || largest == 0) {
    double sum = c;
    for (double p : products) sum += p;
    return static_cast<float>(sum);
  }
  const double quantum = std::ldexp(1.0, std::ilogb(largest) - 25), each = 1 / quantum;
  long long sum = static_cast<long long>(c * each);
  for (double p : products) sum += static_cast<long long>(p * each);
  const double exact = sum * quantum;
  const float nearest = static_cast<float>(exact);
  if (std::fabs(nearest) <= std::fabs(exact) || std::isinf(nearest)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

// See device.h for the layout of the operands; `values` converts a word to the floats it holds.
template <int per_word, class Values>
void mma(int operation, float (&c)[4], const Word* a, Word b0, Word b1, Values values) {
  const Word own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = emulator::collect(operation, own, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 * 4, column = (lane % 4 * 2 + i % 2) * 4;
    double products[8 * per_word];
    for (int l = 0; l < 4; ++l)
      for (int half = 0; half < 2; ++half) {
        const float2 p = values(all[row + l][half * 2 + i / 2]);
        const float2 q = values(all[column + l][4 + half]);
        double* const both = products + (2 * l + half) * per_word;
        both[0] = static_cast<double>(p.x) * q.x;
        if (per_word == 2) both[per_word - 1] = static_cast<double>(p.y) * q.y;
      }
    c[i] = truncated_sum(c[i], products);
  }
}
inline void mma_bf16(float (&c)[4], const Word* a, Word b0, Word b1) {
  mma<2>(2, c, a, b0, b1,
         [](Word w) -> float2 { return {float_of(w << 16), float_of(w & 0xffff0000u)}; });
}
inline void mma_f16(float (&c)[4], const Word* a, Word b0, Word b1) {
  mma<2>(3, c, a, b0, b1, floats_of_f16);
}
inline void mma_tf32(float (&c)[4], const Word* a, Word b0, Word b1) {
  mma<1>(4, c, a, b0, b1, [](Word w) -> float2 { return {float_of(w & 0xffffe000u), 0}; });
}

}  // namespace xprnn
