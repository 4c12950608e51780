// How the blocks of a cluster share what they poll for. Stands behind products.h.
//
// Neighbours in x have the same rows, so each of them needs all of h. In a cluster each polls for
// its part only and sends that to the others' shared memory: every word leaves L2 once a cluster.
// Warps of one number have the same share of the reduction in all of the blocks, and their lanes
// the same pieces; so such warps deal with each other alone, lane by lane, in batches.
//
// Each warp has a place for what the others send it of one batch, and two barriers. A phase of
// `full` ends when all bytes are there that the warp expects; one of `empty`, when all others have
// read what it sent them. All take the same batches in the same order, so their number tells which
// phase is meant. A second place would gain little: before it sends the next batch, a warp polls
// for it, which takes longer than the others read.

namespace xprnn {

constexpr int CLUSTER = XP_CLUSTER;

// What a lane takes at once of a warp's `chunks` pieces of each of a pass's tiles.
template <int cluster, int chunks, int tiles>
struct Batch {
  static constexpr int parts = (chunks + AHEAD * cluster - 1) / (AHEAD * cluster);
  static constexpr int count = chunks / parts;  // pieces of a tile
  static constexpr int own = count / cluster;   // of them, those that one block polls for
  static constexpr int most = parts > 1 ? 1 : AHEAD / own;
  static constexpr int deep = most < tiles ? most : tiles;  // tiles
  static constexpr int pieces = deep * own;                 // that one block polls for
  static constexpr int sent = 32 * 16 * pieces;             // bytes, from warp to warp
  static constexpr int got = (cluster - 1) * sent;
  static_assert(parts * count == chunks && own * cluster == count && tiles % deep == 0,
                "blocks have parts of one size, passes whole batches");
};

// A warp's end of it.
template <int cluster, int chunks, int tiles>
struct Stage {
  typedef Batch<cluster, chunks, tiles> Sizes;
  static constexpr int full = 0, empty = 8, pieces = 16;  // where they stand, in bytes
  static constexpr int bytes = pieces + Sizes::got;       // of shared memory

  unsigned char* here;
  Remote there[cluster - 1];  // the same place in each block behind this one, around the cluster
  int rank;
  Word batch;  // how many were taken

  // The block's shared memory for this begins at `shared`. Every thread of the cluster.
  XP_FN explicit Stage(unsigned char* shared) : rank(cluster_rank()), batch(0) {
    here = shared + threadIdx.x / 32 * bytes;
    for (int d = 1; d < cluster; ++d) there[d - 1] = at_rank(here, (rank + d) % cluster);
    if (threadIdx.x % 32 == 0) {
      init(barrier(full), 1);
      init(barrier(empty), cluster - 1);
      announce_barriers();
    }
    sync_cluster();
  }
  // No block ends while others may still write to it: they are here when what they have sent was
  // waited for, or when they gave up, long after it came. Every thread of the cluster.
  XP_FN void close() const { sync_cluster(); }

  XP_FN Barrier* barrier(int which) const { return reinterpret_cast<Barrier*>(here + which); }
  // Which piece of the warp's share this block has as its k-th: its own ones first, the others in
  // the order of `there`, so that what is done with the k-th one is known when it is compiled.
  XP_FN int piece(int k) const {
    return k - k % Sizes::count + (k % Sizes::count + rank * Sizes::own) % Sizes::count;
  }

  // Sends the others a batch. False: given up.
  XP_FN bool give(const uint4 (&own)[Sizes::pieces], Word spins) const {
    if (!wait(barrier(empty), ~batch & 1, spins)) return false;  // before the first one it is
    if (threadIdx.x % 32 == 0) expect(barrier(full), Sizes::got);
#pragma unroll
    for (int d = 1; d < cluster; ++d)
#pragma unroll
      for (int i = 0; i < Sizes::pieces; ++i)
        send4(there[d - 1] + place(cluster - d, i), own[i], there[d - 1] + full);
    return true;
  }
  // Waits for the others' batches. False: given up.
  XP_FN bool receive(Word spins) const { return wait(barrier(full), batch & 1, spins); }
  // A piece of what came from the block d behind this one.
  XP_FN uint4 get(int d, int i) const {
    return *reinterpret_cast<const uint4*>(here + place(d, i));
  }
  // What came was read: the others may send the next batch.
  XP_FN void release() {
    sync_warp();
    if (threadIdx.x % 32 == 0)
      for (int d = 1; d < cluster; ++d) arrive(there[d - 1] + empty);
    ++batch;
  }
  XP_FN static int place(int d, int i) {
    return pieces + (d - 1) * Sizes::sent + (i * 32 + threadIdx.x % 32) * 16;
  }
  XP_FN static bool wait(Barrier* barrier, Word parity, Word spins) {
    while (!all_lanes(ended(barrier, parity))) {
      if (!spins--) return false;
      pause();
    }
    return true;
  }
};

// A block on its own shares nothing.
template <int chunks, int tiles>
struct Stage<1, chunks, tiles> {
  static constexpr int bytes = 0;
  XP_FN explicit Stage(unsigned char*) {}
  XP_FN void close() const {}
  XP_FN int piece(int k) const { return k; }
};

// How a block cuts its shared memory; what goes by the turn has two places, one for each parity of
// the pass.
template <class Stage, int warps, int partials>
struct Shared {
  unsigned char* start;

  XP_FN Word* stop() const { return reinterpret_cast<Word*>(start); }  // by the turn: given up
  XP_FN unsigned char* staged() const { return start + HEAD; }
  XP_FN float* sums(int turn) const {  // of each warp
    return reinterpret_cast<float*>(staged() + warps * Stage::bytes) + turn * partials;
  }
  XP_FN uint4* rest() const { return reinterpret_cast<uint4*>(sums(2)); }  // is the caller's
};

// A source of weights, in the order in which the block has the pieces.
template <class Source, class Stage>
struct Staged {
  const Source& source;
  const Stage& stage;
  XP_FN uint4 operator()(int gate, int row, int piece) const {
    return source(gate, row, stage.piece(piece));
  }
};
template <class Source, class Stage>
XP_FN Staged<Source, Stage> staged(const Source& source, const Stage& stage) {
  return {source, stage};
}

// Whether all that a lane has of a batch is finite, in the whole warp.
template <class Stage, int pieces>
XP_FN bool all_finite(const Stage& stage, const uint4 (&own)[pieces], int cluster) {
  bool finite = true;
#pragma unroll
  for (int d = 0; d < cluster; ++d)
#pragma unroll
    for (int i = 0; i < pieces; ++i)
      finite = finite && is_finite(d ? stage.get(d, i) : own[i]);
  return all_lanes(finite);
}

// The pieces that this block polls for in a batch: `own` in each tile, from `word` on.
template <int own>
struct OwnPieces {
  const Word* const* rows;
  int word, left;
  XP_FN bool has(int i) const { return word + i % own * PIECE < left; }
  XP_FN const Word* at(int i) const { return rows[i / own] + word + i % own * PIECE; }
};

// One part of a warp's share, of `deep` tiles from `tile` on; rows[t]: where this lane begins in
// tile t. False: given up.
template <int kind, int part, int tiles, int cluster, int lines, int gates, int chunks, int held,
          class Source>
XP_FN bool multiply_batch(float* partial, float (&sums)[lines][4],
                          const Fragments<chunks, held> (&weights)[gates], const Source& source,
                          bool special, Stage<cluster, chunks, tiles>& stage,
                          const Word* const* rows, int left, int tile, int present, Word spins) {
  typedef Batch<cluster, chunks, tiles> Sizes;
  constexpr int from = part * Sizes::count;
  uint4 own[Sizes::pieces];
  const OwnPieces<Sizes::own> polled = {rows, stage.piece(from) * PIECE, left};
  if (await<kind>(own, polled, spins) == NEVER) return false;
  if (!stage.give(own, spins) || !stage.receive(spins)) return false;
  const bool usual = kind != TF32X3 || (all_finite(stage, own, cluster) && !special);
#pragma unroll
  for (int t = 0; t < Sizes::deep; ++t) {
    if (t >= present) break;
    if (part == 0) clear(sums);
    if constexpr (kind == TF32X3)
      if (!usual) multiply_special<gates>(sums, source, rows[t], left, from, Sizes::count);
    if (usual) {
#pragma unroll
      for (int k = 0; k < Sizes::count; ++k) {
        const int d = k / Sizes::own, i = t * Sizes::own + k % Sizes::own;
        multiply_piece<kind>(sums, weights, from + k, d ? stage.get(d, i) : own[i]);
      }
    }
    if (part == Sizes::parts - 1)
      leave<gates, 8 * tiles>(partial, threadIdx.x / 32, threadIdx.x % 32, tile + t, sums);
  }
  stage.release();
  if constexpr (part + 1 < Sizes::parts)
    return multiply_batch<kind, part + 1>(partial, sums, weights, source, special, stage, rows,
                                          left, tile, present, spins);
  return true;
}

// `multiply_pass` of products.h for a block of any cluster; its weights stand in the order of
// `stage`.
template <int kind, int tiles, int cluster, int gates, int chunks, int held, class Source>
XP_FN bool multiply_pass(float* partial, const Fragments<chunks, held> (&weights)[gates],
                         const Source& source, bool special, Stage<cluster, chunks, tiles>& stage,
                         const Word* p, int words, int left, int first, int end, Word spins) {
  if constexpr (cluster == 1) {
    return multiply_pass<kind, tiles>(partial, weights, source, special, p, words, left, first, end,
                                      spins);
  } else {
    constexpr int deep = Batch<cluster, chunks, tiles>::deep;
#pragma unroll 1
    for (int tile = 0; tile < tiles && first + 8 * tile < end; tile += deep) {
      const Word* rows[deep];
#pragma unroll
      for (int t = 0; t < deep; ++t)
        rows[t] = row_of_mail(p, words, first + 8 * (tile + t) + threadIdx.x % 32 / 4, first, end);
      float sums[lines_of(gates)][4];
      const int present = (end - first + 7) / 8 - tile;
      if (!multiply_batch<kind, 0>(partial, sums, weights, source, special, stage, rows, left, tile,
                                   present, spins))
        return false;
    }
    return true;
  }
}

}  // namespace xprnn
