// kernels/memory.cuh for a run on the CPU: the same names; every vector load and store is checked as the one
// access that it is on the device.
#pragma once

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int thread_index_again() { return thread_index(); }
__device__ __forceinline__ unsigned not_kept(unsigned x) { return x; }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }

__device__ __forceinline__ int grid_size() { return static_cast<int>(gridDim.x); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ double shuffle_xor(double x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ __forceinline__ unsigned shuffle_xor(unsigned x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ __forceinline__ bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ unsigned warp_vote(bool x) { return __ballot_sync(0xffffffffu, x); }

__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ int highest_bit(unsigned bits) { return 31 - __clz(static_cast<int>(bits)); }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

__device__ __forceinline__ int take_ticket(int* counter) { return atomicAdd(counter, 1); }
template <typename T>
__device__ __forceinline__ void add_global(T* address, T x) {
  atomicAdd(address, x);
}

#define DYNAMIC_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(emulator::dynamic_shared(alignof(Type) > 16 ? alignof(Type) : 16))

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* address, int bytes) {
  return reinterpret_cast<unsigned long long>(address) % bytes == 0;
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_global(const T* address) {
  const emulator::Bytes bytes = emulator::load_constant_bytes(address, N * sizeof(T));
  Vector<T, N> vector;
  __builtin_memcpy(&vector, &bytes, sizeof vector);
  return vector;
}

template <typename T, int N>
__device__ __forceinline__ void store_global(T* address, const Vector<T, N>& vector) {
  emulator::Bytes bytes{};
  __builtin_memcpy(&bytes, &vector, sizeof vector);
  emulator::store_bytes(address, bytes, N * sizeof(T));
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_shared(const T* address) {
  const emulator::Bytes bytes = emulator::load_bytes(address, N * sizeof(T));
  Vector<T, N> vector;
  __builtin_memcpy(&vector, &bytes, sizeof vector);
  return vector;
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_global_written(const T* address) {
  return load_shared<N>(address);
}

template <typename T, int N>
__device__ __forceinline__ void store_shared(T* address, const Vector<T, N>& vector) {
  emulator::Bytes bytes{};
  __builtin_memcpy(&bytes, &vector, sizeof vector);
  emulator::store_bytes(address, bytes, N * sizeof(T));
}

#if __CUDA_ARCH__ >= 800
constexpr bool ASYNC_COPIES = true;
#else
constexpr bool ASYNC_COPIES = false;
#endif

template <int N, typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* global, bool inside) {
  if constexpr (ASYNC_COPIES) {
    emulator::copy_async(emulator::shared_address(shared), global, N * sizeof(T), inside ? N * sizeof(T) : 0);
  } else {
    Vector<T, N> vector = {};
    if (inside) vector = load_global<N>(global);
    store_shared(shared, vector);
  }
}

__device__ __forceinline__ void wait_copies() {
  if constexpr (ASYNC_COPIES) emulator::copy_async_wait_all();
}
