// A GPU as its kernels see it, for the host's compiler: a kernel's source, translated by translate.py, is compiled with this
// header ahead of it, and each of its threads is one of the host's. model.cpp has how it is done.
//
// Modelled:
// - threads of a warp that are not in step, shuffles, votes, named barriers, clusters and what a block of one reads of another;
// - shared memory, which a block finds full of NaN, and of which only what was launched with may be touched;
// - copies behind a thread's back: they happen at any time between their start and what waits for them (see `Copies`);
// - mbarriers, with arrivals, bytes and phases: too many of either end the process;
// - products by the tensor cores (wgmma): their operands are read, and their results there, only when the thread waits for
//   them; until then the registers have what they had;
// - threads that all wait for each other: the process says where they do, and ends;
// - blocks that wait for others of a launch that has them all at work: each cluster is a process, and what lies in global
//   memory is `Shared` by them.
//
// Not modelled, so that no test with it shows:
// - fences between what threads write and what the copy engine and the tensor cores read (fence.proxy.async, wgmma.fence,
//   fence.mbarrier_init), and the order of memory beyond what the sanitizer sees of threads;
// - wgmma.mma_async that begins before its operands are there: they are read when the thread waits for it; and these reads
//   are not the sanitizer's: what is copied over operands too soon shows in the result;
// - what the instructions of a warp ask of it (`.aligned`), registers, occupancy, banks, and time; setmaxnreg, programmatic
//   dependent launch;
// - the last bits of approximate functions (__expf, __fdividef, rsqrtf, ex2, rcp), whose exact ones are taken;
// - blocks at the same time, of other launches: clusters run one after the other.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// The language's words. A block's shared variables lie in a section of their own, so that the model finds them: blocks of a
// cluster would share them, and have to use `extern __shared__`.
#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__ static
#define __device__
#define __shared__ static __attribute__((section("block_shared")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// After CUDA's own headers: the paths that a GPU of compute capability 9.0 takes.
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace model {

// Ends the process, with a line that begins with "model: ".
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- Launches. Of blocks one cluster at a time; a block has `shared` bytes of `extern __shared__`.

struct Grid {
  dim3 blocks, threads;
  size_t shared;
};
void run(const Grid& grid, int cluster, bool at_once, const void* kernel, const std::function<void()>& thread);

// The last launch's error, until it is asked for.
extern cudaError_t last_error;
inline cudaError_t take_last_error() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// Blocks that are at work at the same time, where a launch asks for that.
constexpr unsigned MOST_TOGETHER = 8;

// Blocks of a cluster, as the kernel's __cluster_dims__ has it; translate.py has kernels ask for it.
extern int cluster;
void in_cluster_of(int blocks);

// kernel<<<blocks, threads, shared, stream>>>(arguments...)
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 blocks, dim3 threads, size_t shared, cudaStream_t, const Arguments&... arguments) {
  run({blocks, threads, shared}, cluster, false, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
template <typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...), const Arguments&... arguments) {
  bool together = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    together = together || (config->attrs[i].id == cudaLaunchAttributeCooperative && config->attrs[i].val.cooperative != 0);
  }
  if (together && config->gridDim.x > MOST_TOGETHER) {
    return last_error = cudaErrorCooperativeLaunchTooLarge;
  }
  run({config->gridDim, config->blockDim, config->dynamicSmemBytes}, cluster, together, reinterpret_cast<const void*>(kernel),
      [&] { kernel(arguments...); });
  return cudaSuccess;
}

// Of the last launch the steps of products (wgmma.commit_group) of the cluster that had the most, in a block's fifth warp.
int most_steps();

// What is global memory to all blocks of such a launch: of it a process has no copy of its own.
void* map_shared(size_t bytes);
void unmap_shared(void* at, size_t bytes);
template <typename T>
struct Shared {
  using value_type = T;
  Shared() = default;
  template <typename Other>
  Shared(const Shared<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(map_shared(n * sizeof(T))); }
  void deallocate(T* at, size_t n) { unmap_shared(at, n * sizeof(T)); }
  bool operator==(const Shared&) const { return true; }
  bool operator!=(const Shared&) const { return false; }
};
inline cudaError_t set_memory(void* at, int value, size_t bytes, cudaStream_t) {
  memset(at, value, bytes);
  return cudaSuccess;
}

// More than 48 KB of shared memory must be asked for.
cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes);
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, cudaFuncAttribute attribute, int bytes) {
  return allow_shared(reinterpret_cast<const void*>(kernel), attribute, bytes);
}

// Of the driver there is cuTensorMapEncodeTiled.
cudaError_t entry_point(const char* name, void** function, unsigned long long flags, cudaDriverEntryPointQueryResult* found);
inline cudaError_t entry_point(
    const char* name, void** function, unsigned, unsigned long long flags, cudaDriverEntryPointQueryResult* found) {
  return entry_point(name, function, flags, found);
}

// --- Shared memory. An address is the place in the thread's own block, or, beyond OTHER, in one of its cluster.

constexpr uint32_t OTHER = 1 << 24;
void* shared_memory();
uint32_t shared_address(const void* at);
uint32_t address_in(uint32_t address, uint32_t block); // mapa
char* shared_at(uint32_t address, int bytes);
inline void write_shared(uint32_t address, uint32_t value) { memcpy(shared_at(address, 4), &value, 4); }
inline uint32_t read_shared(uint32_t address) {
  uint32_t value;
  memcpy(&value, shared_at(address, 4), 4);
  return value;
}

// --- Threads that wait for each other.

uint32_t block_in_cluster();
void block_barrier();
void named_barrier(unsigned number, unsigned threads);
void cluster_barrier();
uint32_t exchange(uint32_t value, int offset); // with the lane whose number differs in the bits of `offset`
bool any(bool value);

void barrier_init(uint32_t barrier, int count);
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, int bytes); // arrives, too
int barrier_wait(uint32_t barrier, int parity);

// In global memory, by blocks of one launch.
void count(int* at);
void wait_for_count(const int* at, int times);

// --- Copies. A thread's own, of 16 bytes into shared memory, which its waits bring to an end.

void copy_16(uint32_t to, const void* from);
void commit_copies();
void wait_for_copies(int groups); // until so many at most are not done
inline void wait_for_all_copies() {
  commit_copies();
  wait_for_copies(0);
}

// The copy engine's, of tiles; which blocks of the cluster have one is a bit for each.
void load_tile(uint32_t to, const CUtensorMap* from, int x, int y, uint32_t barrier);
void load_tile(uint32_t to, const CUtensorMap* from, int x, int y, uint32_t barrier, uint16_t blocks);
void store_tile(const CUtensorMap* to, int x, int y, uint32_t from);
void commit_stores();
void wait_for_stores(int groups);
void wait_for_stores_read(int groups);

// When the engine copies: as soon as it is told to; when every thread waits and nothing else can happen, in any order; or at
// any time, in any order, beside the threads. What a kernel overwrites too soon shows with the first two, what threads and the
// engine do at once with the last, to the sanitizer.
enum Copies { EARLY, LATE, ANY };
extern Copies copies;

// --- The tensor cores. d is a thread's part of the 64 x 256 that the 128 threads of four warps have.

void multiply(const char* type, const char* turned, float (&d)[128], uint64_t rows, uint64_t columns, int adds);
void commit_products();
void wait_for_products(int groups);

// --- Functions that the host has not, or under another name.

inline float divide(float a, float b) { return a / b; }
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of_half(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  __half value;
  memcpy(&value, &low, 2);
  return __half2float(value);
}
inline float exchange(float value, int offset) { return float_of(exchange(bits_of(value), offset)); }
inline double exchange(double value, int offset) {
  uint32_t halves[2];
  memcpy(halves, &value, 8);
  for (uint32_t& half : halves) {
    half = exchange(half, offset);
  }
  memcpy(&value, halves, 8);
  return value;
}
inline float product(float a, float b) { // rounded, and part of no fused sum
  volatile float value = a * b;
  return value;
}
inline uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline float float_of_integer(int64_t x) { return static_cast<float>(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; } // .ftz
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    value |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  }
  return value;
}

} // namespace model

using std::min;

#define __shfl_xor_sync(mask, value, offset) model::exchange(value, offset)
#define __any_sync(mask, value) model::any(value)
#define __all_sync(mask, value) (!model::any(!(value)))
#define __syncwarp() model::any(true)
#define __syncthreads() model::block_barrier()
#define __cvta_generic_to_shared(at) model::shared_address(at)
#define __trap() model::fail("__trap")
#define __uint_as_float model::float_of
#define __float_as_uint model::bits_of
#define __byte_perm model::permuted
#define __fmul_rn model::product
#define __umulhi model::high_product
#define __int2float_rn model::float_of_integer
#define __ll2float_rn model::float_of_integer
#define __fdividef model::divide
#define __expf std::exp
#define rsqrtf model::inverse_root
#define cudaLaunchKernelEx model::launch
#define cudaMemsetAsync model::set_memory
#define cudaFuncSetAttribute model::allow_shared
#define cudaGetLastError model::take_last_error
#define cudaGetDriverEntryPoint model::entry_point
#define cudaGetDriverEntryPointByVersion model::entry_point
