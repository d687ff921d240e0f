// Products of matrices for compute capability 9.0, whose tensor cores read their operands from shared memory and whose copy
// engine brings tiles there.
//
// Two blocks that share the weights' tiles work on 256 rows. In each, one thread has tiles copied, some steps ahead, and two
// groups of four warps multiply: a group's 64 rows by 256 rows of the weights. What becomes of a tile is computed and written
// while the tensor cores are at the next one: `multiply_tiles` calls for a part of it with each step.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.h"

namespace kernelhub {

namespace {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4; // of a block's tile, of a step, and steps at hand
constexpr int BLOCKS = 2; // that share weights
[[maybe_unused]] constexpr int TALL = 8;  // pairs of blocks below each other which are at work before the next columns are
constexpr int X_BYTES = ROWS * DEPTH * 2, WEIGHT_BYTES = COLUMNS / BLOCKS * DEPTH * 2; // of the weights what a block copies
constexpr int STAGE_BYTES = X_BYTES + BLOCKS * WEIGHT_BYTES;
constexpr int OUT_COLUMNS = 128, OUT_BYTES = ROWS * OUT_COLUMNS * 2; // what is written at a time
constexpr int GROUP = 128, GROUPS = 2, THREADS = (1 + GROUPS) * GROUP;
[[maybe_unused]] constexpr int WRITES = 8; // parts in which a tile is written, one with each step
// 1024: tiles begin at multiples of it.
constexpr int SHARED = 1024 + STAGES * STAGE_BYTES + OUT_BYTES + (2 * STAGES + GROUPS) * 8;

// Of a product, in tiles: pairs of blocks' rows, and columns.
struct Sizes {
  int down, across, depth;
};

struct Place {
  int row, column; // of a pair of blocks' tile, counted in such
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// Arrives; the barrier also waits for that many bytes.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Without a scope of its own: with that of the cluster each wait empties the first cache, and each arrival waits for all
// memory, which took a quarter of the time.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// The same by all threads of a warp, which go on together. Beside the products no other wait will do: after a loop of each thread's
// own the compiler takes all that is counted along for the threads' own, too, and a step takes longer.
__device__ __forceinline__ void warp_wait(uint32_t barrier, int parity) {
  int done;
  do {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.b32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!__all_sync(~0u, done));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block)
      : "memory");
}

// What a thread had the copy engine write, and waited for, is there for other blocks' engines to copy, once they know of it.
__device__ __forceinline__ void tell_written(int* count) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ __forceinline__ void wait_until_written(const int* count, int times) {
  asm volatile(
      "{\n.reg .pred done;\n.reg .b32 found;\nAGAIN:\nld.acquire.gpu.global.b32 found, [%0];\nsetp.ge.s32 done, found, %1;\n"
      "@done bra READY;\nnanosleep.u32 100;\nbra AGAIN;\nREADY:\nfence.proxy.async.global;\n}" ::"l"(count),
      "r"(times)
      : "memory");
}

__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& from, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// Into both blocks' shared memory, at the same place.
__device__ __forceinline__ void load_shared_tile(uint32_t to, const CUtensorMap& from, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(to),
      "l"(&from), "r"(x), "r"(y), "r"(barrier), "h"(static_cast<uint16_t>((1 << BLOCKS) - 1))
      : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap& to, uint32_t from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(x), "r"(y),
               "r"(from)
               : "memory");
}

// A tile's rows of 128 bytes, 8 of which make 1024 bytes whose 16-byte parts the copy engine has permuted.
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The same of a tile whose rows are steps and whose columns are those of the product: 64 of them beside each other, and the next
// 64 behind all steps.
__device__ __forceinline__ uint64_t turned_descriptor(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | uint64_t(DEPTH * 128 >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// d = 64 rows of the tile at `rows` times 256 at `columns`, 16 elements deep; added to d where `adds`. TURNED: the second tile's
// rows are steps.
#define EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define THIRTY_TWO(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define WGMMA(TYPE, TURN) \
  asm volatile( \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " " \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, " \
      "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
      "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
      "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, adds, 1, 1, 0, " TURN ";\n}" \
      : THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96) \
      : "l"(rows), "l"(columns), "r"(adds))

template <typename T, bool TURNED>
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t rows, uint64_t columns, int adds) {
  constexpr bool BRAIN = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (BRAIN && TURNED) {
    WGMMA("bf16", "1");
  } else if constexpr (BRAIN) {
    WGMMA("bf16", "0");
  } else if constexpr (TURNED) {
    WGMMA("f16", "1");
  } else {
    WGMMA("f16", "0");
  }
}
#undef WGMMA
#undef THIRTY_TWO
#undef EIGHT

// Two elements in one register. Unpacked by what the compiler may not move: where it does so ahead, registers run out.
template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(two);
  } else {
    const __half2 two = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(two);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t a, b;
    asm volatile("shl.b32 %0, %2, 16;\nand.b32 %1, %2, 0xffff0000;" : "=r"(a), "=r"(b) : "r"(two));
    return {__uint_as_float(a), __uint_as_float(b)};
  } else {
    float2 wide;
    asm volatile("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(wide.x), "=f"(wide.y) : "r"(two));
    return wide;
  }
}

// The order in which tiles are taken: those at work at a time share rows and columns, which the second cache then holds.
__device__ __forceinline__ Place place(int tile, int down, int across) {
  const int band = TALL * across, first = tile / band * TALL, inside = tile % band, tall = min(TALL, down - first);
  return {first + inside % tall, inside / tall};
}

// What a thread knows of its pair of blocks, and where things lie in shared memory.
struct Work {
  uint32_t block, tiles_at, out_at, full, empty, read; // the last three barriers: of each stage, and one for each group
  int pair, pairs;
};

__device__ __forceinline__ Work begin_work() {
  extern __shared__ char memory[];
  Work work;
  work.tiles_at = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
  work.out_at = work.tiles_at + STAGES * STAGE_BYTES;
  work.full = work.out_at + OUT_BYTES;
  work.empty = work.full + STAGES * 8;
  work.read = work.empty + STAGES * 8;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(work.block));
  work.pair = blockIdx.x / BLOCKS;
  work.pairs = gridDim.x / BLOCKS;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(work.full + 8 * stage, 1);
      barrier_init(work.empty + 8 * stage, BLOCKS * GROUPS); // a stage has weights for both blocks
    }
    for (int group = 0; group < GROUPS; ++group) {
      barrier_init(work.read + 8 * group, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  return work;
}

// The tiles of a product that a pair of blocks makes: each `pairs`-th, from its first on.
struct Tiles {
  int first, count, steps, down, across;

  __device__ __forceinline__ Tiles(const Sizes& sizes, int first)
      : first(first), count(sizes.down * sizes.across), steps((sizes.depth + DEPTH - 1) / DEPTH), down(sizes.down), across(sizes.across) {}
};

// Neither block ends while the other may still write to its shared memory.
__device__ __forceinline__ void end_work() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// The stage that is next, and which phase of its barriers is waited for.
struct Stage {
  int number, parity;

  __device__ __forceinline__ void advance() {
    if (++number == STAGES) {
      number = 0;
      parity ^= 1;
    }
  }
};

// Of the first group a thread's work. `load_weights(to, depth, column, barrier)` has this block's half of a tile's weights
// copied, from that depth on, the column counted in tiles; `begin(row)` is called ahead of a tile, the row counted in blocks'.
template <typename Begin, typename LoadWeights>
__device__ __forceinline__ void copy_tiles(
    const Work& work, const Tiles& tiles, Stage& stage, const CUtensorMap& x, Begin begin, LoadWeights load_weights) {
  for (int tile = tiles.first; tile < tiles.count; tile += work.pairs) {
    const Place at = place(tile, tiles.down, tiles.across);
    const int row = BLOCKS * at.row + work.block;
    begin(row);
    for (int step = 0; step < tiles.steps; ++step) {
      const uint32_t barrier = work.full + 8 * stage.number, to = work.tiles_at + stage.number * STAGE_BYTES;
      barrier_wait(work.empty + 8 * stage.number, stage.parity);
      barrier_expect(barrier, STAGE_BYTES);
      load_tile(to, x, step * DEPTH, row * ROWS, barrier);
      load_weights(to + X_BYTES + work.block * WEIGHT_BYTES, step * DEPTH, at.column, barrier);
      stage.advance();
    }
  }
}

// The same, of a kernel that makes one product.
template <typename LoadWeights>
__device__ __forceinline__ void copy_all_tiles(
    const Work& work, const Tiles& tiles, const CUtensorMap& x, LoadWeights load_weights) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  if (threadIdx.x == 0) {
    Stage stage{0, 1};
    copy_tiles(work, tiles, stage, x, [](int) {}, load_weights);
  }
}

// The other groups' work. A thread of a group has of its 64 rows the one at `thread / 32 * 16 + thread % 32 / 4` and the one 8
// below, and of each 8 columns two, from `thread % 4 * 2` on: d[4 * n] and d[4 * n + 1] are those of the n-th eight, and the
// next two those of the other row. `do_part()` does a part of what else there is to do, if there is any; `finish(place)` is
// called when d is the product.
template <typename T, bool TURNED = false, typename DoPart, typename Finish>
__device__ __forceinline__ void multiply_tiles(
    const Work& work, const Tiles& tiles, Stage& stage, int group, int thread, float (&d)[128], DoPart do_part, Finish finish) {
  const auto release = [&] { // the stage before this one, in both blocks
    if (thread < BLOCKS) {
      barrier_arrive(work.empty + 8 * (stage.number ? stage.number - 1 : STAGES - 1), thread);
    }
  };
  for (int tile = tiles.first; tile < tiles.count; tile += work.pairs) {
    for (int step = 0; step < tiles.steps; ++step) {
      barrier_wait(work.full + 8 * stage.number, stage.parity);
      const uint32_t from = work.tiles_at + stage.number * STAGE_BYTES;
      const uint64_t rows = descriptor(from + group * (X_BYTES / GROUPS)), columns = TURNED ? turned_descriptor(from + X_BYTES) : descriptor(from + X_BYTES);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k) {
        multiply<T, TURNED>(d, rows + 2 * k, columns + (TURNED ? 128 : 2) * k, step | k);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      do_part();
      if (step > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release();
      }
      stage.advance();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 128; ++i) { // not read before this: that products write to registers later the compiler does not know
      asm volatile("" : "+f"(d[i])::"memory");
    }
    release();
    finish(place(tile, tiles.down, tiles.across));
  }
}

// By all threads of another warp, as often as each group tells something.
__device__ __forceinline__ void hear() {
  for (int group = 0; group < GROUPS; ++group) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + GROUPS + group), "n"(GROUP + 32) : "memory");
  }
}

// A group's shared memory beside the operands, for what it writes and for what else it reads: 64 rows of 128 columns, as the
// copy engine has them. A thread has the elements that it has of a product.
struct Out {
  uint32_t at, mine, turn;
  int group, thread;

  __device__ __forceinline__ Out(const Work& work, int group, int thread) : group(group), thread(thread) {
    at = work.out_at + group * (OUT_BYTES / GROUPS);
    mine = at + row() * 128 + thread % 4 * 4;
    turn = row() % 8 * 16;
  }

  // Of the group's, the upper of the thread's two.
  __device__ __forceinline__ int row() const { return thread / 32 * 16 + thread % 32 / 4; }

  __device__ __forceinline__ void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory"); }

  // Before the first is written, or copied here: until what was written before has been copied, and all have read what is here.
  __device__ __forceinline__ void begin() const {
    if (thread == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    sync();
  }

  // Two columns of the n-th eight of 16; `below` for the row 8 below.
  __device__ __forceinline__ uint32_t place_of(int n, int below) const {
    return mine + n / 8 * (OUT_BYTES / GROUPS / 2) + below * 1024 + ((n % 8 * 16) ^ turn);
  }
  __device__ __forceinline__ void write(int n, int below, uint32_t two) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(place_of(n, below)), "r"(two) : "memory");
  }
  __device__ __forceinline__ uint32_t read(int n, int below) const {
    uint32_t two;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(two) : "r"(place_of(n, below)) : "memory");
    return two;
  }

  // After the last: copies the columns from x on and the rows from y on.
  __device__ __forceinline__ void end(const CUtensorMap& to, int x, int y) const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync();
    if (thread == 0) {
      store_tile(to, at, x, y);
      store_tile(to, at + OUT_BYTES / GROUPS / 2, x + 64, y);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }

  // One of WRITES parts of what is written of a tile, in two halves: `kept` has its elements in 16 bits, in the order of d.
  __device__ __forceinline__ void write_part(int part, const uint32_t (&kept)[64], const CUtensorMap& to, int x, int y) const {
    if (part % (WRITES / 2) == 0) {
      begin();
    }
    switch (part) {
#define PART(n) \
  case n: \
    _Pragma("unroll") for (int i = 8 * n; i < 8 * n + 8; ++i) { \
      write(i / 2 % 16, i % 2, kept[i]); \
    } \
    break;
      PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7)
#undef PART
    }
    if (part % (WRITES / 2) == WRITES / 2 - 1) {
      end(to, x + (part == WRITES - 1 ? OUT_COLUMNS : 0), y);
    }
  }

  // When all is written, and the warp is there that is told so, by `hear`.
  __device__ __forceinline__ void tell() const {
    wait();
    asm volatile("bar.sync %0, %1;" ::"r"(1 + GROUPS + group), "n"(GROUP + 32) : "memory");
  }

  // When all is written.
  __device__ __forceinline__ void wait() const {
    if (thread == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
};

#endif

using Encode = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, which this library is not linked with.
cudaError_t find_encode(Encode& encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  encode = reinterpret_cast<Encode>(found);
  return error == cudaSuccess && (status != cudaDriverEntryPointSuccess || found == nullptr) ? cudaErrorNotSupported : error;
}

inline int tiles_of(int64_t n, int size) { return static_cast<int>((n + size - 1) / size); }

// The tensors of a call as the copy engine is told of them; `error` is the first one's that could not be.
class Describe {
 public:
  explicit Describe(Dtype dtype) : dtype_(dtype) {
    static Encode encode = nullptr;
    static const cudaError_t found = find_encode(encode);
    encode_ = encode;
    error = found;
  }

  void x(CUtensorMap& map, const void* data, int64_t rows, int64_t depth) { add(map, data, rows, depth, ROWS); }
  void weight(CUtensorMap& map, const void* data, int64_t columns, int64_t depth) {
    add(map, data, columns, depth, COLUMNS / BLOCKS);
  }
  // A weight whose rows are steps, as a backward has it.
  void turned_weight(CUtensorMap& map, const void* data, int64_t depth, int64_t columns) {
    add(map, data, depth, columns, DEPTH);
  }
  void result(CUtensorMap& map, const void* data, int64_t rows, int64_t columns) {
    add(map, data, rows, columns, ROWS / GROUPS);
  }

  cudaError_t error;

 private:
  // A matrix that is copied in tiles of 64 columns and as many rows.
  void add(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int tall) {
    if (error != cudaSuccess) {
      return;
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride = sizes[0] * 2;
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tall)}, elements[] = {1, 1};
    const CUresult made = encode_(
        &map, dtype_ == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void*>(data), sizes, &stride, box, elements, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    error = made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
  }

  Encode encode_;
  Dtype dtype_;
};

// Not launched before what came before is done (programmatic dependent launch): that changed nothing. TOGETHER: all blocks are
// at work at the same time, or none, which is an error.
template <bool TOGETHER = false, typename... Arguments>
cudaError_t start_tiles(void (*kernel)(Arguments...), const Device& device, const Arguments&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::max(device.multiprocessors / BLOCKS, 1) * BLOCKS);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED;
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &together;
  config.numAttrs = TOGETHER;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace

} // namespace kernelhub
