// A small kernel in the manner of the sm90 family, for the checker's own tests: out = silu-free (a b^T) c by
// TMA, mbarriers and wgmma, one producer warp and two consumer warpgroups. a (128 rows a block, 64), b (64 keys
// a turn, 64), c (64, 64) for each turn, float16; out (rows, 64) float32, stored by TMA.
//
//   producer, turn t:   wait empty[s] -> expect bytes -> load b, c of the turn -> full[s]
//   consumer, turn t:   wait full[s] -> s = a b^T -> p = 16-bit s -> out += p c -> release empty[s], a lane for
//   each warp
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

struct Smem {
  alignas(1024) unsigned short a[2][64][64];
  alignas(1024) unsigned short b[2][64][64];
  alignas(1024) unsigned short c[2][64][64];
  alignas(1024) float out[2][2][64][32];  // of each warpgroup, 32 columns each
  unsigned long long full_a, full[2], empty[2];
};

constexpr int TILE = 64 * 64 * 2;

extern "C" __global__ void __launch_bounds__(384, 1)
    sample_sm90(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                const __grid_constant__ TensorMap map_c, const __grid_constant__ TensorMap map_out, int turns) {
  DYNAMIC_SHARED(Smem, smem);
  const int group = thread_index() / 128, warp = thread_index() / 32 % 4, lane = thread_index() % 32;
  const unsigned full_a = shared_address(&smem.full_a), full = shared_address(smem.full);
  const unsigned empty = shared_address(smem.empty);
  if (thread_index() == 0) {
    mbarrier_init(full_a, 1);
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 8);  // one arrival for each consumer warp
    }
    fence_mbarrier_init();
  }
  sync_block();  // the mbarriers are there
  if (group == 2) {
    setmaxnreg_dec<24>();
    if (warp == 0 && lane == 0) {
      mbarrier_arrive_expect_tx(full_a, 2 * TILE);
      for (int g = 0; g < 2; ++g) {
        tensor_load(shared_address(smem.a[g]), map_a, full_a, 0, 128 * block_index() + 64 * g);
      }
      for (int turn = 0; turn < turns; ++turn) {
        const int s = turn % 2;
        mbarrier_wait(empty + 8 * s, turn / 2 % 2 ^ 1);  // its readers are done with the stage
        mbarrier_arrive_expect_tx(full + 8 * s, 2 * TILE);
        tensor_load(shared_address(smem.b[s]), map_b, full + 8 * s, 0, 64 * turn);
        tensor_load(shared_address(smem.c[s]), map_c, full + 8 * s, 0, 64 * turn);
      }
    }
    return;
  }
  setmaxnreg_inc<240>();
  const unsigned long long k_major = descriptor_base(Swizzle::BYTES_128, 16, 1024);
  const unsigned long long mn_major = descriptor_base(Swizzle::BYTES_128, 8192, 1024);
  const unsigned long long desc_a = k_major + (shared_address(smem.a[group]) >> 4);
  float out[32];
  for (int i = 0; i < 32; ++i) out[i] = 0;
  mbarrier_wait(full_a, 0);  // a is there
  for (int turn = 0; turn < turns; ++turn) {
    const int s = turn % 2;
    const unsigned long long desc_b = k_major + (shared_address(smem.b[s]) >> 4);
    const unsigned long long desc_c = mn_major + (shared_address(smem.c[s]) >> 4);
    mbarrier_wait(full + 8 * s, turn / 2 % 2);  // b and c of the turn are there
    float scores[32];
    wgmma_fence();  // scores: the previous turn's reads are over
    wgmma_first_ss<Float16, Major::K, Major::K>(scores, desc_a, desc_b);
    for (int k = 1; k < 4; ++k) wgmma_ss<Float16, Major::K, Major::K>(scores, desc_a + 2 * k, desc_b + 2 * k);
    wgmma_commit();
    wgmma_wait<0>();  // scores are there
    wgmma_hold(scores);
    unsigned p[4][4];
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < 4; ++i) p[k][i] = pack<Float16>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    }
    wgmma_fence();  // p and out are written: the products may read them
    for (int k = 0; k < 4; ++k) wgmma_rs<Float16, Major::MN>(out, p[k], desc_c + 128 * k);
    wgmma_commit();
    wgmma_wait<0>();  // out is there, and the stage is read
    wgmma_hold(out);
    if (lane == 0) mbarrier_arrive(empty + 8 * s);  // this warp is done with the stage
  }
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int chunk = (column % 32 / 4) ^ (row % 8);  // the swizzle that the store will undo
    smem.out[group][column / 32][row][4 * chunk + column % 4] = out[i];
  }
  fence_proxy_async_shared();    // the store reads through the async proxy
  barrier_sync(1 + group, 128);  // the warpgroup's rows are written
  if (thread_index() % 128 == 0) {
    for (int half = 0; half < 2; ++half) {
      tensor_store(map_out, shared_address(smem.out[group][half]), 32 * half, 128 * block_index() + 64 * group);
    }
    bulk_commit();
    bulk_wait_read<0>();  // shared memory lives until it is read
  }
}
