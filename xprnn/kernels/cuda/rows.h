// Kernels in which a block computes one row; replaced when tests run on a CPU, where one thread
// computes a row alone. The number of threads of a launch is THREADS for each row.

namespace xprnn {

constexpr int THREADS = 128;  // of a block
constexpr int STEP = THREADS;  // from a column of a thread to its next one

// The first column of a thread; it stores what the row has one of if that is 0.
XP_FN int first_column(Index i) { return static_cast<int>(i % THREADS); }

// Barrier of a row's threads; what they have stored is visible after it.
XP_FN void sync_row() { __syncthreads(); }

// The sum over a row's threads, in each of them; in the same order in each launch.
template <class A>
XP_FN A sum_over_row(A share) {
  __shared__ A parts[THREADS / 32];
  for (int bits = 16; bits; bits >>= 1) share += __shfl_xor_sync(0xffffffffu, share, bits);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = share;
  sync_row();
  const A sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  sync_row();  // before the next sum is stored there
  return sum;
}

}  // namespace xprnn
