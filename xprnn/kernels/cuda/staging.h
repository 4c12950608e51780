// How the blocks of a cluster share what they poll. Included after products.h.
//
// Blocks adjacent in x have the same rows, so each of them needs all of h. In a cluster each block
// polls one part and sends it to the shared memory of the others, so that every word is read from
// L2 once per cluster. Warps of the same number have the same share of the reduction in every
// block, and their lanes the same words; such warps exchange with each other only, lane by lane, in
// batches.
//
// Each warp has a buffer for one batch received from the others, and two barriers. A phase of
// `full` ends when all expected bytes have arrived; a phase of `empty`, when all other blocks have
// read what the warp sent them. All process the same batches in the same order, so the number of a
// batch determines the phase. A second buffer would gain little: before it sends the next batch, a
// warp polls for it, which takes longer than the others need to read.

namespace xprnn {

constexpr int CLUSTER = XP_CLUSTER;

// The part of a warp's `k_blocks` of each row tile of a pass that is processed at once.
template <int cluster, int k_blocks, int row_tiles>
struct Batch {
  static constexpr int parts = (k_blocks + POLL_DEPTH * cluster - 1) / (POLL_DEPTH * cluster);
  static constexpr int count = k_blocks / parts;  // k-blocks of a tile
  static constexpr int own = count / cluster;     // of these, those polled by one block
  static constexpr int max_tiles = parts > 1 ? 1 : POLL_DEPTH / own;
  static constexpr int tiles = max_tiles < row_tiles ? max_tiles : row_tiles;
  static constexpr int polled = tiles * own;            // k-blocks polled by one block
  static constexpr int sent_bytes = 32 * 16 * polled;   // from warp to warp
  static constexpr int received_bytes = (cluster - 1) * sent_bytes;
  static_assert(parts * count == k_blocks && own * cluster == count && row_tiles % tiles == 0,
                "parts have equal sizes and passes consist of complete batches");
};

// One warp's side of the exchange.
template <int cluster, int k_blocks, int row_tiles>
struct Stage {
  typedef Batch<cluster, k_blocks, row_tiles> Sizes;
  static constexpr int full = 0, empty = 8, data = 16;        // byte offsets
  static constexpr int bytes = data + Sizes::received_bytes;  // of shared memory

  unsigned char* local;
  Remote remote[cluster - 1];  // the same address in the blocks that follow, around the cluster
  int rank;
  Word batch;  // number of batches processed

  // `shared`: the block's shared memory for all warps. Called by every thread of the cluster.
  XP_FN explicit Stage(unsigned char* shared) : rank(cluster_rank()), batch(0) {
    local = shared + threadIdx.x / 32 * bytes;
    for (int d = 1; d < cluster; ++d) remote[d - 1] = at_rank(local, (rank + d) % cluster);
    if (threadIdx.x % 32 == 0) {
      init(barrier(full), 1);
      init(barrier(empty), cluster - 1);
      fence_barrier_init();
    }
    sync_cluster();
  }
  // No block may end while others can still write to it: they arrive here after receiving what was
  // sent, or after a timeout, long after it arrived. Called by every thread of the cluster.
  XP_FN void close() const { sync_cluster(); }

  XP_FN Barrier* barrier(int which) const { return reinterpret_cast<Barrier*>(local + which); }
  // Which k-block of the warp's share this block processes as its k-th: its own ones first, then
  // the others in the order of `remote`, so that the source of the k-th one is a compile-time
  // constant.
  XP_FN int k_block(int k) const {
    return k - k % Sizes::count + (k % Sizes::count + rank * Sizes::own) % Sizes::count;
  }

  // Sends a batch to the others. Returns false on a timeout.
  XP_FN bool send(const uint4 (&own)[Sizes::polled], Word max_polls) const {
    if (!wait(barrier(empty), ~batch & 1, max_polls)) return false;  // true before the first batch
    if (threadIdx.x % 32 == 0) expect(barrier(full), Sizes::received_bytes);
#pragma unroll
    for (int d = 1; d < cluster; ++d)
#pragma unroll
      for (int i = 0; i < Sizes::polled; ++i)
        send4(remote[d - 1] + offset(cluster - d, i), own[i], remote[d - 1] + full);
    return true;
  }
  // Waits for the batches of the others. Returns false on a timeout.
  XP_FN bool receive(Word max_polls) const { return wait(barrier(full), batch & 1, max_polls); }
  // The i-th k-block received from the d-th block after this one.
  XP_FN uint4 get(int d, int i) const {
    return *reinterpret_cast<const uint4*>(local + offset(d, i));
  }
  // Everything received has been read: the others may send the next batch.
  XP_FN void release() {
    sync_warp();
    if (threadIdx.x % 32 == 0)
      for (int d = 1; d < cluster; ++d) arrive(remote[d - 1] + empty);
    ++batch;
  }
  XP_FN static int offset(int d, int i) {
    return data + (d - 1) * Sizes::sent_bytes + (i * 32 + threadIdx.x % 32) * 16;
  }
  XP_FN static bool wait(Barrier* barrier, Word parity, Word max_polls) {
    while (!all_lanes(ended(barrier, parity))) {
      if (!max_polls--) return false;
      pause();
    }
    return true;
  }
};

// Without a cluster nothing is shared.
template <int k_blocks, int row_tiles>
struct Stage<1, k_blocks, row_tiles> {
  static constexpr int bytes = 0;
  XP_FN explicit Stage(unsigned char*) {}
  XP_FN void close() const {}
  XP_FN int k_block(int k) const { return k; }
};

// The layout of a block's shared memory. Flags and sums are double-buffered, by the parity of the
// pass.
template <class Stage, int warps, int partials>
struct Shared {
  unsigned char* start;

  XP_FN Word* timed_out() const { return reinterpret_cast<Word*>(start); }  // (2,) by parity
  XP_FN unsigned char* staged() const { return start + SHARED_HEADER; }
  XP_FN float* sums(int parity) const {  // partial sums of all warps
    return reinterpret_cast<float*>(staged() + warps * Stage::bytes) + parity * partials;
  }
  XP_FN uint4* weights() const { return reinterpret_cast<uint4*>(sums(2)); }  // and what follows
};

// A source of weights, in the order in which the block processes the k-blocks.
template <class Source, class Stage>
struct Staged {
  const Source& source;
  const Stage& stage;
  XP_FN uint4 operator()(int gate, int row, int k_block) const {
    return source(gate, row, stage.k_block(k_block));
  }
};
template <class Source, class Stage>
XP_FN Staged<Source, Stage> staged(const Source& source, const Stage& stage) {
  return {source, stage};
}

// Whether all words of a batch are finite, in all lanes of the warp.
template <class Stage, int polled>
XP_FN bool all_finite(const Stage& stage, const uint4 (&own)[polled], int cluster) {
  bool finite = true;
#pragma unroll
  for (int d = 0; d < cluster; ++d)
#pragma unroll
    for (int i = 0; i < polled; ++i)
      finite = finite && is_finite(d ? stage.get(d, i) : own[i]);
  return all_lanes(finite);
}

// The k-blocks that this block polls in a batch: `own` of each tile, from `word` on.
template <int own>
struct PolledBlocks {
  const Word* const* rows;
  int word, left;
  XP_FN bool has(int i) const { return word + i % own * K_BLOCK_WORDS < left; }
  XP_FN const Word* at(int i) const { return rows[i / own] + word + i % own * K_BLOCK_WORDS; }
};

// One part of a warp's share, of Batch::tiles tiles from `tile` on; rows[t]: where this lane starts
// in tile t. Returns false on a timeout.
template <int mode, int part, int row_tiles, int cluster, int accumulators, int gates,
          int k_blocks, int in_registers, class Source>
XP_FN bool multiply_batch(float* partial, float (&sums)[accumulators][4],
                          const Fragments<k_blocks, in_registers> (&weights)[gates],
                          const Source& source, bool nonfinite,
                          Stage<cluster, k_blocks, row_tiles>& stage, const Word* const* rows,
                          int left, int tile, int present, Word max_polls) {
  typedef Batch<cluster, k_blocks, row_tiles> Sizes;
  constexpr int from = part * Sizes::count;
  uint4 own[Sizes::polled];
  const PolledBlocks<Sizes::own> polled = {rows, stage.k_block(from) * K_BLOCK_WORDS, left};
  if (await<mode>(own, polled, max_polls) == TIMED_OUT) return false;
  if (!stage.send(own, max_polls) || !stage.receive(max_polls)) return false;
  const bool fast_path = mode != TF32X3 || (all_finite(stage, own, cluster) && !nonfinite);
#pragma unroll
  for (int t = 0; t < Sizes::tiles; ++t) {
    if (t >= present) break;
    if (part == 0) clear(sums);
    if constexpr (mode == TF32X3)
      if (!fast_path) multiply_nonfinite<gates>(sums, source, rows[t], left, from, Sizes::count);
    if (fast_path) {
#pragma unroll
      for (int k = 0; k < Sizes::count; ++k) {
        const int d = k / Sizes::own, i = t * Sizes::own + k % Sizes::own;
        multiply_k_block<mode>(sums, weights, from + k, d ? stage.get(d, i) : own[i]);
      }
    }
    if (part == Sizes::parts - 1)
      store_partial_sums<gates, 8 * row_tiles>(partial, threadIdx.x / 32, threadIdx.x % 32,
                                               tile + t, sums);
  }
  stage.release();
  if constexpr (part + 1 < Sizes::parts)
    return multiply_batch<mode, part + 1>(partial, sums, weights, source, nonfinite, stage, rows,
                                          left, tile, present, max_polls);
  return true;
}

// `multiply_pass` of products.h for any cluster size; the weights are in the order of `stage`.
template <int mode, int row_tiles, int cluster, int gates, int k_blocks, int in_registers,
          class Source>
XP_FN bool multiply_pass(float* partial, const Fragments<k_blocks, in_registers> (&weights)[gates],
                         const Source& source, bool nonfinite,
                         Stage<cluster, k_blocks, row_tiles>& stage, const Word* p, int words,
                         int left, int first, int end, Word max_polls) {
  if constexpr (cluster == 1) {
    return multiply_pass<mode, row_tiles>(partial, weights, source, nonfinite, p, words, left,
                                          first, end, max_polls);
  } else {
    constexpr int tiles = Batch<cluster, k_blocks, row_tiles>::tiles;
#pragma unroll 1
    for (int tile = 0; tile < row_tiles && first + 8 * tile < end; tile += tiles) {
      const Word* rows[tiles];
#pragma unroll
      for (int t = 0; t < tiles; ++t)
        rows[t] = exchange_row(p, words, first + 8 * (tile + t) + threadIdx.x % 32 / 4, first, end);
      float sums[accumulators_of(gates)][4];
      const int present = (end - first + 7) / 8 - tile;
      if (!multiply_batch<mode, 0>(partial, sums, weights, source, nonfinite, stage, rows, left,
                                   tile, present, max_polls))
        return false;
    }
    return true;
  }
}

}  // namespace xprnn
