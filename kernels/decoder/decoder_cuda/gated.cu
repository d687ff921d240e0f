// Two products of matrices and what follows them, f(a) * b, in one pass: of a tile's columns the first half are `gate`'s and
// the other half the same ones of `up`, so that a thread has a and b of the same elements.

#include "formulas.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace kernelhub {

namespace {

struct Maps {
  CUtensorMap x, gate, up, y, a, b;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// KEEP: whether a and b are written too.
template <typename T, int FUNCTION, bool KEEP>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
gated_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  const Work work = begin_work(sizes);
  if (threadIdx.x < GROUP) {
    copy_tiles(work, maps.x, [&](uint32_t to, int depth, int column, uint32_t barrier) {
      load_shared_tile(to, work.block ? maps.up : maps.gate, depth, column * OUT_COLUMNS, barrier);
    });
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr int ALL = KEEP ? 3 * WRITES : WRITES;
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    float d[128];
    uint32_t kept[64]; // a and b of the tile before, in 16 bits
    int part = ALL;
    Place before{};

    const auto write_columns = [&](int eight, int which) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const uint32_t a = kept[2 * eight + below], b = kept[32 + 2 * eight + below];
        uint32_t y = which == 0 ? a : b;
        if (which == 2) {
          const float2 x = unpack<T>(a), by = unpack<T>(b), f = unpack<T>(pack<T>(find<FUNCTION>(x.x).value, find<FUNCTION>(x.y).value));
          y = pack<T>(f.x * by.x, f.y * by.y);
        }
        out.write(eight, below, y);
      }
    };
    const auto write_part = [&] {
      const int which = KEEP ? part / WRITES : 2;
      if (part % WRITES == 0) {
        out.begin();
      }
      switch (part % WRITES) {
#define PART(n) \
  case n: \
    write_columns(2 * n, which); \
    write_columns(2 * n + 1, which); \
    break;
        PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7)
#undef PART
      }
      if (++part % WRITES == 0) {
        const int row = (BLOCKS * before.row + work.block) * ROWS + out.group * (ROWS / GROUPS);
        out.end(which == 0 ? maps.a : which == 1 ? maps.b : maps.y, before.column * OUT_COLUMNS, row);
      }
    };
    const auto do_part = [&] {
      if (part < ALL) {
        write_part();
      }
    };
    const auto finish = [&](const Place& at) {
      while (part < ALL) { // there were fewer steps than parts
        write_part();
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        kept[i] = pack<T>(d[2 * i], d[2 * i + 1]);
      }
      before = at;
      part = 0;
    };
    multiply_tiles<T>(work, out.group, out.thread, d, do_part, finish);
    while (part < ALL) {
      write_part();
    }
    out.wait();
  }
  end_work();
}

#else

template <typename T, int FUNCTION, bool KEEP>
__global__ void gated_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  __trap();
}

#endif

template <typename T, int FUNCTION>
cudaError_t start(const Maps& maps, const Sizes& sizes, bool keep, const Device& device) {
  return keep ? start_tiles(gated_tiles<T, FUNCTION, true>, device, maps, sizes)
              : start_tiles(gated_tiles<T, FUNCTION, false>, device, maps, sizes);
}

template <typename T>
cudaError_t start(const Maps& maps, const Sizes& sizes, bool keep, int function, const Device& device) {
  return function == SILU ? start<T, SILU>(maps, sizes, keep, device) : start<T, GELU_TANH>(maps, sizes, keep, device);
}

} // namespace

int gated_product(const GatedArgs& args, Dtype dtype, const Device& device) {
  Maps maps;
  Describe describe(dtype);
  describe.x(maps.x, args.x, args.rows, args.depth);
  describe.weight(maps.gate, args.gate, args.columns, args.depth);
  describe.weight(maps.up, args.up, args.columns, args.depth);
  describe.result(maps.y, args.y, args.rows, args.columns);
  const bool keep = args.a != nullptr;
  if (keep) {
    describe.result(maps.a, args.a, args.rows, args.columns);
    describe.result(maps.b, args.b, args.rows, args.columns);
  }
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  const Sizes sizes{tiles_of(args.rows, BLOCKS * ROWS), tiles_of(args.columns, OUT_COLUMNS), static_cast<int>(args.depth)};
  return dtype == BFLOAT16 ? start<__nv_bfloat16>(maps, sizes, keep, args.function, device)
                           : start<__half>(maps, sizes, keep, args.function, device);
}

} // namespace kernelhub
