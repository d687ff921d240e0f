// Two products of matrices and what follows them, f(a) * b, in one pass: for compute capability 9.0, whose tensor cores read
// their operands from shared memory and whose copy engine brings tiles there.
//
// Two blocks that share the weights' tiles work on 256 rows. In each, one thread has tiles copied, some steps ahead, and two
// groups of four warps multiply: a group's 64 rows by 128 rows of `gate` and the same 128 of `up`, so that a thread has a and
// b of the same elements. What becomes of a tile is computed and written while the tensor cores are at the next one.

#include <algorithm>
#include <type_traits>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace kernelhub {

namespace {

constexpr int ROWS = 128, COLUMNS = 128, DEPTH = 64, STAGES = 4; // of a block's tile, of a step, and steps at hand
constexpr int BLOCKS = 2; // that share weights
[[maybe_unused]] constexpr int TALL = 8;  // pairs of blocks below each other which are at work before the next columns are
constexpr int X_BYTES = ROWS * DEPTH * 2, WEIGHT_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + 2 * WEIGHT_BYTES;
constexpr int OUT_BYTES = ROWS * COLUMNS * 2;
constexpr int SHARED = 1024 + STAGES * STAGE_BYTES + OUT_BYTES + 2 * STAGES * 8; // 1024: tiles begin at multiples of it
constexpr int GROUP = 128, GROUPS = 2, THREADS = (1 + GROUPS) * GROUP;
[[maybe_unused]] constexpr int PARTS = 8; // in which a tile is written, one with each step

struct Maps {
  CUtensorMap x, gate, up, y, a, b;
};

struct Sizes {
  int rows, columns, depth;
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

__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block)
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

// d = 64 rows of the tile at `rows` times 256 at `columns`, 16 elements deep; added to d where `adds`.
#define EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define THIRTY_TWO(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define WGMMA(TYPE) \
  asm volatile( \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " " \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, " \
      "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
      "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
      "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, adds, 1, 1, 0, 0;\n}" \
      : THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96) \
      : "l"(rows), "l"(columns), "r"(adds))

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t rows, uint64_t columns, int adds) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    WGMMA("bf16");
  } else {
    WGMMA("f16");
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
    return __half22float2(reinterpret_cast<const __half2&>(two));
  }
}

// As kernels/activation has them for 16 bits.
template <int FUNCTION>
__device__ __forceinline__ float value(float x) {
  if constexpr (FUNCTION == SILU) {
    return __fdividef(x, 1.0f + __expf(-x));
  } else {
    return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * fmaf(0.044715f * x * x, x, x)));
  }
}

struct Place {
  int row, column; // of a pair of blocks' tile, counted in such
};

// The order in which tiles are taken: those at work at a time share rows and columns, which the second cache then holds.
__device__ __forceinline__ Place place(int tile, int down, int across) {
  const int band = TALL * across, first = tile / band * TALL, inside = tile % band, tall = min(TALL, down - first);
  return {first + inside % tall, inside / tall};
}

// KEEP: whether a and b are written too.
template <typename T, int FUNCTION, bool KEEP>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
gated_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  extern __shared__ char memory[];
  const uint32_t tiles_at = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
  const uint32_t out_at = tiles_at + STAGES * STAGE_BYTES, full = out_at + OUT_BYTES, empty = full + STAGES * 8;
  uint32_t block;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  const int pair = blockIdx.x / BLOCKS, pairs = gridDim.x / BLOCKS;
  const int down = (sizes.rows + BLOCKS * ROWS - 1) / (BLOCKS * ROWS), across = (sizes.columns + COLUMNS - 1) / COLUMNS;
  const int tiles = down * across, steps = (sizes.depth + DEPTH - 1) / DEPTH;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, BLOCKS * GROUPS); // a stage has weights for both blocks
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");

  if (threadIdx.x < GROUP) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0, parity = 1;
      for (int tile = pair; tile < tiles; tile += pairs) {
        const Place at = place(tile, down, across);
        const int row = (BLOCKS * at.row + block) * ROWS, column = at.column * COLUMNS;
        for (int step = 0; step < steps; ++step) {
          const uint32_t barrier = full + 8 * stage, to = tiles_at + stage * STAGE_BYTES;
          barrier_wait(empty + 8 * stage, parity);
          barrier_expect(barrier, STAGE_BYTES);
          load_tile(to, maps.x, step * DEPTH, row, barrier);
          load_shared_tile(to + X_BYTES + block * WEIGHT_BYTES, block ? maps.up : maps.gate, step * DEPTH, column, barrier);
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr int ALL = KEEP ? 3 * PARTS : PARTS;
    const int group = threadIdx.x / GROUP - 1, thread = threadIdx.x % GROUP;
    const int row = thread / 32 * 16 + thread % 32 / 4; // and the one 8 below, of two columns in each 8
    const uint32_t out = out_at + group * (OUT_BYTES / GROUPS), mine = out + row * 128 + thread % 4 * 4, turn = row % 8 * 16;
    float d[128];
    uint32_t kept[64]; // a and b of the tile before, in 16 bits
    int stage = 0, parity = 0, part = ALL;
    Place before{};

    const auto sync_group = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory"); };
    const auto release = [&] { // the stage before this one, in both blocks
      if (thread < BLOCKS) {
        barrier_arrive(empty + 8 * (stage ? stage - 1 : STAGES - 1), thread);
      }
    };
    const auto write_columns = [&](int eight, int which) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a = kept[2 * eight + half], b = kept[32 + 2 * eight + half];
        uint32_t y = which == 0 ? a : b;
        if (which == 2) {
          const float2 x = unpack<T>(a), by = unpack<T>(b), f = unpack<T>(pack<T>(value<FUNCTION>(x.x), value<FUNCTION>(x.y)));
          y = pack<T>(f.x * by.x, f.y * by.y);
        }
        const uint32_t to = mine + eight / 8 * (OUT_BYTES / GROUPS / 2) + half * 1024 + ((eight % 8 * 16) ^ turn);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(y) : "memory");
      }
    };
    const auto write_part = [&] {
      const int which = KEEP ? part / PARTS : 2;
      if (part % PARTS == 0) {
        if (thread == 0) {
          asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        sync_group();
      }
      switch (part % PARTS) {
#define PART(n) \
  case n: \
    write_columns(2 * n, which); \
    write_columns(2 * n + 1, which); \
    break;
        PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7)
#undef PART
      }
      if (++part % PARTS == 0) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync_group();
        if (thread == 0) {
          const CUtensorMap& to = which == 0 ? maps.a : which == 1 ? maps.b : maps.y;
          const int x = before.column * COLUMNS, y = (BLOCKS * before.row + block) * ROWS + group * (ROWS / GROUPS);
          store_tile(to, out, x, y);
          store_tile(to, out + OUT_BYTES / GROUPS / 2, x + 64, y);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    };

    for (int tile = pair; tile < tiles; tile += pairs) {
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        const uint32_t from = tiles_at + stage * STAGE_BYTES;
        const uint64_t rows = descriptor(from + group * (X_BYTES / GROUPS)), columns = descriptor(from + X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
          multiply<T>(d, rows + 2 * k, columns + 2 * k, step | k);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (part < ALL) {
          write_part();
        }
        if (step > 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release();
        }
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 128; ++i) { // not read before this: that products write to registers later the compiler does not know
        asm volatile("" : "+f"(d[i])::"memory");
      }
      release();
      while (part < ALL) { // there were fewer steps than parts
        write_part();
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        kept[i] = pack<T>(d[2 * i], d[2 * i + 1]);
      }
      before = place(tile, down, across);
      part = 0;
    }
    while (part < ALL) {
      write_part();
    }
    if (thread == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
  // Neither block ends while the other may still write to its shared memory.
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

#else

template <typename T, int FUNCTION, bool KEEP>
__global__ void gated_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  __trap();
}

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

// A matrix that is copied in tiles of 64 columns and as many rows.
cudaError_t describe(CUtensorMap& map, Encode encode, Dtype dtype, const void* data, int64_t rows, int64_t columns, int tall) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride = sizes[0] * 2;
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tall)}, elements[] = {1, 1};
  const CUresult made = encode(
      &map, dtype == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data),
      sizes, &stride, box, elements, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, int FUNCTION, bool KEEP>
cudaError_t start(const Maps& maps, const Sizes& sizes, const Device& device) {
  const auto kernel = gated_tiles<T, FUNCTION, KEEP>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  if (error != cudaSuccess) {
    return error;
  }
  const int blocks = std::max(device.multiprocessors / BLOCKS, 1) * BLOCKS;
  kernel<<<blocks, THREADS, SHARED, static_cast<cudaStream_t>(device.stream)>>>(maps, sizes);
  return cudaGetLastError();
}

template <typename T, int FUNCTION>
cudaError_t start(const Maps& maps, const Sizes& sizes, bool keep, const Device& device) {
  return keep ? start<T, FUNCTION, true>(maps, sizes, device) : start<T, FUNCTION, false>(maps, sizes, device);
}

template <typename T>
cudaError_t start(const Maps& maps, const Sizes& sizes, bool keep, int function, const Device& device) {
  return function == SILU ? start<T, SILU>(maps, sizes, keep, device) : start<T, GELU_TANH>(maps, sizes, keep, device);
}

} // namespace

int gated_product(const GatedArgs& args, Dtype dtype, const Device& device) {
  static Encode encode = nullptr;
  static const cudaError_t found = find_encode(encode);
  if (found != cudaSuccess) {
    return found;
  }
  Maps maps;
  const auto describe_all = [&](CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int tall) {
    return describe(map, encode, dtype, data, rows, columns, tall);
  };
  cudaError_t error = describe_all(maps.x, args.x, args.rows, args.depth, ROWS);
  error = error != cudaSuccess ? error : describe_all(maps.gate, args.gate, args.columns, args.depth, COLUMNS);
  error = error != cudaSuccess ? error : describe_all(maps.up, args.up, args.columns, args.depth, COLUMNS);
  const bool keep = args.a != nullptr;
  error = error != cudaSuccess ? error : describe_all(maps.y, args.y, args.rows, args.columns, ROWS / GROUPS);
  if (keep) {
    error = error != cudaSuccess ? error : describe_all(maps.a, args.a, args.rows, args.columns, ROWS / GROUPS);
    error = error != cudaSuccess ? error : describe_all(maps.b, args.b, args.rows, args.columns, ROWS / GROUPS);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const Sizes sizes{static_cast<int>(args.rows), static_cast<int>(args.columns), static_cast<int>(args.depth)};
  return dtype == BFLOAT16 ? start<__nv_bfloat16>(maps, sizes, keep, args.function, device)
                           : start<__half>(maps, sizes, keep, args.function, device);
}

} // namespace kernelhub
