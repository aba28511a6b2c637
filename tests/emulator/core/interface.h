// What words and CUDA's functions call: the emulator as a kernel sees it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

struct Dim3 {
  uint32_t x, y, z;
};
struct Builtins {
  Dim3 thread, block, block_dim, grid_dim;
};

Dim3 thread_index();  // by value, in registers: an access that the hooks do not see
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();
void *dynamic_shared(uint32_t alignment);
uint32_t shared_address(const void *p);

// warp.cpp
void sync_warp(uint32_t mask);
uint32_t active_mask();
uint64_t shuffle(const char *name, uint32_t mask, uint64_t value, int argument, int width, int mode);
enum ShuffleMode { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };
uint32_t vote(const char *name, uint32_t mask, bool predicate, int mode);
enum VoteMode { VOTE_BALLOT, VOTE_ALL, VOTE_ANY };
uint32_t reduce(const char *name, uint32_t mask, uint32_t value, int mode);
enum ReduceMode {
  REDUCE_ADD,
  REDUCE_MIN,
  REDUCE_MAX,
  REDUCE_MIN_SIGNED,
  REDUCE_MAX_SIGNED,
  REDUCE_AND,
  REDUCE_OR,
  REDUCE_XOR
};
uint32_t match_any(uint32_t mask, uint64_t value);
bool elect(uint32_t mask);
void load_matrix(uint32_t *registers, int count, uint32_t address, bool transposed);
void store_matrix(const uint32_t *registers, int count, uint32_t address, bool transposed);
uint32_t transpose_matrix(uint32_t value);

// tensor_core.cpp
enum Format { FLOAT16, BFLOAT16, TFLOAT32, FLOAT64 };
void mma(Format format, int m, int n, int k, void *d, const void *a, const void *b, const void *c);

// barrier.cpp
void sync_threads();
uint32_t sync_threads_vote(bool predicate, int mode);
enum SyncVoteMode { SYNC_COUNT, SYNC_AND, SYNC_OR };
void named_barrier(const char *name, uint32_t id, uint32_t threads, bool wait);

// copy_async.cpp
void copy_async(uint32_t destination, const void *source, uint32_t bytes, uint32_t source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);
void copy_async_wait_all();  // committed or not

// mbarrier.cpp
void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_invalidate(uint32_t address);
void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t bytes, bool expects);
void mbarrier_expect(uint32_t address, uint32_t bytes);
bool mbarrier_test(uint32_t address, uint32_t parity);
void mbarrier_wait(uint32_t address, uint32_t parity);
void fence_mbarrier_init();

// bulk.cpp: sizes and coordinates as in PTX
void bulk_load(uint32_t destination, const void *source, uint32_t bytes, uint32_t mbarrier);
void bulk_store(void *destination, uint32_t source, uint32_t bytes);
enum BulkReduce {
  BULK_ADD_F32,
  BULK_ADD_F64,
  BULK_ADD_F16,
  BULK_ADD_BF16,
  BULK_ADD_U32,
  BULK_MIN_F16,
  BULK_MAX_F16
};
void bulk_reduce(void *destination, uint32_t source, uint32_t bytes, BulkReduce operation);
void tensor_load(uint32_t destination, const void *map, uint32_t mbarrier, int rank, const int *coordinates);
void tensor_store(const void *map, uint32_t source, int rank, const int *coordinates);
void tensor_reduce_add(const void *map, uint32_t source, int rank, const int *coordinates);
void bulk_commit();
void bulk_wait(int groups_left, bool read_only);
void fence_proxy_async(bool shared, bool global);

// wgmma.cpp
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
// a: four registers, or nullptr for a descriptor; transposed: the operand is MN-major
void wgmma(Format format, int n, float *d, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool a_transposed, bool b_transposed, bool accumulate);

// atomics.cpp
enum AtomicOperation {
  ATOMIC_ADD,
  ATOMIC_MIN,
  ATOMIC_MAX,
  ATOMIC_AND,
  ATOMIC_OR,
  ATOMIC_XOR,
  ATOMIC_EXCHANGE,
  ATOMIC_CAS
};
enum AtomicType { TYPE_I32, TYPE_U32, TYPE_I64, TYPE_U64, TYPE_F32, TYPE_F64, TYPE_F16, TYPE_BF16 };
enum MemoryOrder { RELAXED = 0, ACQUIRE = 1, RELEASE = 2, ACQUIRE_RELEASE = 3 };
uint64_t atomic(AtomicOperation operation, AtomicType type, void *p, uint64_t value, uint64_t compare,
                MemoryOrder order);
void atomic_vector_add(AtomicType type, void *p, const void *values, int count);  // red.global.add.v2, .v4
uint64_t load_ordered(const void *p, uint32_t bytes, MemoryOrder order);
void store_ordered(void *p, uint64_t value, uint32_t bytes, MemoryOrder order);
void memory_fence(MemoryOrder order);

// hooks.cpp: loads and stores by words that know more than an ordinary access says. bytes: 1, 2, 4, 8 or 16,
// and the address's alignment.
struct Bytes {
  uint64_t low, high;
};
Bytes load_bytes(const void *p, uint32_t bytes);
Bytes load_constant_bytes(const void *p, uint32_t bytes);  // of memory that no thread writes during the kernel
void store_bytes(void *p, Bytes value, uint32_t bytes);

[[noreturn]] void trap();

// float_formats.cpp
uint16_t to_float16(float value);
float from_float16(uint16_t bits);
uint16_t to_bfloat16(float value);
float from_bfloat16(uint16_t bits);

// launch.cpp
const char *run_kernel(void (*entry)(void *), void *arguments, size_t argument_bytes, const void *symbol);

}  // namespace emulator
