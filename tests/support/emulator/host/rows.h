// kernels/cuda/rows.h for g++ on the host: the first thread of a block computes its row alone.

namespace xprnn {

constexpr int THREADS = 128;
constexpr int STEP = 1;

inline int first_column(Index i) { return i % THREADS ? 0x7fffffff : 0; }

inline void sync_row() {}

template <class A>
inline A sum_over_row(A share) {
  return share;
}

}  // namespace xprnn
