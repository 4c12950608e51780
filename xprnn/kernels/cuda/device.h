// The device operations of the persistent kernels, in inline PTX; NVIDIA's headers are not needed.
// The kernels use no other operations beyond C++, so that the tests can replace this file by
// functions of the same names and run the kernels on a CPU.

namespace xprnn {

typedef unsigned int Word;  // 32 bits: one float, or two values of a 16-bit dtype

#ifndef XP_CLUSTER
#define XP_CLUSTER 1  // blocks of a cluster, adjacent in x; more than 1 needs sm_90
#endif
#if XP_CLUSTER > 1
#define XP_KERNEL(threads) \
  __global__ void __cluster_dims__(XP_CLUSTER, 1, 1) __launch_bounds__(threads, 1)
#else
#define XP_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#endif
#define XP_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Barrier of the block; writes to shared memory before it are visible after it.
XP_FN void sync_block() { __syncthreads(); }

// Whether p holds in every lane; also reconverges the warp.
XP_FN bool all_lanes(bool p) { return __all_sync(0xffffffffu, p); }

// Barrier of the warp; orders the memory accesses of its lanes.
XP_FN void sync_warp() { __syncwarp(); }

// Called between two polls. (The emulator switches threads here.)
XP_FN void pause() {}

XP_FN float float_of(Word w) { return __uint_as_float(w); }
XP_FN Word word_of(float a) { return __float_as_uint(a); }

// The same word, opaque to the compiler, so that computations on it are not hoisted out of loops.
XP_FN Word opaque(Word w) {
  asm volatile("" : "+r"(w));
  return w;
}

// 0, with a data dependency on `a`. (Blocks are one-dimensional, so %ntid.y - 1 is 0.)
XP_FN float zero_after(float a) {
  Word rows;
  asm("mov.u32 %0, %%ntid.y;" : "=r"(rows));
  return float_of(word_of(a) & (rows - 1));
}

// Loads of words that other blocks may be writing: from L2, never from a stale line of L1.
XP_FN uint4 poll4(const Word* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
XP_FN uint2 poll2(const Word* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p)
               : "memory");
  return v;
}
XP_FN Word poll(const Word* p) {
  Word v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Stores that other blocks poll for. Each word is stored atomically; two words in any order.
XP_FN void publish(Word* p, Word v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
XP_FN void publish2(Word* p, Word v, Word w) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v), "r"(w) : "memory");
}

// A store that is visible to the host while the kernel is still running.
XP_FN void store_to_host(Word* p, Word v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Load of such a word; slow, from host memory.
XP_FN Word load_from_host(const Word* p) {
  Word v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Starts to fetch the line of an address into L2.
XP_FN void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Operations between the blocks of a cluster, from sm_90 on: see "Asynchronous operations" and
// "mbarrier" in the PTX ISA.
struct Barrier {  // an mbarrier: a phase ends after its arrivals and all expected bytes
  unsigned long long bits;
};
typedef Word Remote;  // an address in the shared memory of any block of the cluster

XP_FN Word shared_address(const void* p) { return static_cast<Word>(__cvta_generic_to_shared(p)); }

XP_FN Word cluster_rank() {
  Word rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Barrier of the threads of the cluster that have not ended; warps need not be converged.
XP_FN void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address of `p`, in this block's shared memory, in that of another block of the cluster.
XP_FN Remote at_rank(const void* p, Word rank) {
  Remote remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  return remote;
}

// An asynchronous store to another block, which then counts 16 bytes at a barrier of that block.
XP_FN void send4(Remote to, uint4 v, Remote barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}

XP_FN void init(Barrier* barrier, Word count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// Makes the barriers initialised by this thread visible to the cluster after its next barrier.
XP_FN void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives at a barrier of this block and adds to the bytes that its phase waits for.
XP_FN void expect(Barrier* barrier, Word bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Arrives at a barrier of another block: what this warp has read may be overwritten. Not
// `.release.cluster`, which sm_90 implements by a fence that waits for all stores to global memory.
XP_FN void arrive(Remote barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Whether the latest phase of a parity has ended; waits about as long as a poll of L2 takes. Not
// `.acquire.cluster`, which would also invalidate L1: the data sent is in shared memory.
XP_FN bool ended(Barrier* barrier, Word parity) {
  Word yes;
  asm volatile(
      "{.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, 500;\n\t"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(yes)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return yes;
}

// Two floats rounded to 16 bits in one word, the first in the low half; a NaN becomes 0x7fff.
XP_FN Word bf16_pair(float low, float high) {
  Word r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
XP_FN Word f16_pair(float low, float high) {
  Word r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
XP_FN float2 floats_of_f16(Word w) {
  float2 v;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(w));
  return v;
}

// c (16, 8) += a (16, k) b (k, 8), by a warp. With g = lane / 4 and l = lane % 4, a lane holds
// rows g and g + 8 and columns 2l and 2l + 1 of c; the words l and l + 4 of rows g and g + 8 of a,
// in the order (g, l) (g + 8, l) (g, l + 4) (g + 8, l + 4); and the words l and l + 4 of column g
// of b.
#define XP_MMA(name, shape, type)                                                           \
  XP_FN void name(float (&c)[4], const Word* a, Word b0, Word b1) {                         \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                             \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
  }
XP_MMA(mma_bf16, "m16n8k16", "bf16")
XP_MMA(mma_f16, "m16n8k16", "f16")
XP_MMA(mma_tf32, "m16n8k8", "tf32")  // ignores the last 13 bits of each operand

}  // namespace xprnn
