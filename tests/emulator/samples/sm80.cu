// A small kernel in the manner of the sm80 family, for the checker's own tests: out = a b^T by cp.async,
// ldmatrix and mma.sync. a (rows, 16 DEPTH), b (64, 16 DEPTH) float16, row-major; out (rows, 64) float32; 64
// rows a block.
//
//   one turn, stage s:   load(next) -> the other stage | wait for s | block: s is there | multiply | block: s
//   is read
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"

constexpr int DEPTH = 4;  // turns, 16 columns each
struct Smem {
  unsigned short a[2][64][16 + 8];  // 8 columns of padding: rows start in different banks
  unsigned short b[2][64][16 + 8];
  float row_sum[64];
  float out[64][64 + 4];
};

__device__ void load(unsigned short (&tile)[64][24], const unsigned short* from, int rows, int turn) {
  const int row = thread_index() / 2, half = thread_index() % 2;
  const int bytes = row < rows ? 16 : 0;
  const unsigned short* source = from + (bytes ? row * 16 * DEPTH + 16 * turn + 8 * half : 0);
  cp_async<16>(shared_address(&tile[row][8 * half]), source, bytes);
}

extern "C" __global__ void __launch_bounds__(128)
    sample_sm80(const unsigned short* a, const unsigned short* b, float* out, float* row_sums, int rows) {
  DYNAMIC_SHARED(Smem, smem);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  a += block_index() * 64 * 16 * DEPTH;
  out += block_index() * 64 * 64;
  rows -= block_index() * 64;
  float d[8][4] = {};
  load(smem.a[0], a, rows, 0);
  load(smem.b[0], b, 64, 0);
  cp_async_commit();
  for (int turn = 0; turn < DEPTH; ++turn) {
    const int s = turn % 2;
    if (turn + 1 < DEPTH) {
      load(smem.a[1 - s], a, rows, turn + 1);
      load(smem.b[1 - s], b, 64, turn + 1);
    }
    cp_async_commit();
    cp_async_wait<1>();  // this stage's copies, of this thread
    sync_block();        // and of all threads
    unsigned fragment_a[4];
    ldmatrix_x4(fragment_a, shared_address(&smem.a[s][16 * warp + lane % 16][8 * (lane / 16)]));
    for (int j = 0; j < 8; j += 2) {
      unsigned fragment_b[4];
      ldmatrix_x4(fragment_b,
                  shared_address(&smem.b[s][8 * j + lane % 8 + 8 * (lane / 16)][8 * (lane / 8 % 2)]));
      const unsigned left[2] = {fragment_b[0], fragment_b[1]}, right[2] = {fragment_b[2], fragment_b[3]};
      mma_m16n8k16<Float16>(d[j], fragment_a, left);
      mma_m16n8k16<Float16>(d[j + 1], fragment_a, right);
    }
    sync_block();  // the stage is read: the next turn's load may overwrite it
  }
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    float sum = 0;
    for (int j = 0; j < 8; ++j) {
      for (int e = 0; e < 2; ++e) {
        smem.out[row][8 * j + 2 * (lane % 4) + e] = d[j][2 * half + e];
        sum += d[j][2 * half + e];
      }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0) smem.row_sum[row] = sum;
  }
  sync_warp();  // the warp's 16 rows are written, by all its lanes
  for (int i = lane; i < 16 * 16; i += 32) {
    const int row = 16 * warp + i / 16, column = i % 16 * 4;
    if (row < rows) store_global(out + 64 * row + column, load_shared<4>(&smem.out[row][column]));
  }
  if (lane < 16 && 16 * warp + lane < rows)
    row_sums[block_index() * 64 + 16 * warp + lane] = smem.row_sum[16 * warp + lane];
}
