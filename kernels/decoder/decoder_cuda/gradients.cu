// A product of matrices, which is the gradient of f(a) * b, and what follows from it in one pass: the gradients of a and b, and
// f(a) * b again. A tile's a and b are copied to shared memory 64 columns at a time, while the next tile's product is made; their
// gradients take the same places, and the product again takes the registers of its gradient.

#include "formulas.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace kernelhub {

namespace {

struct Maps {
  CUtensorMap grad, weight, a, b, a_grad, b_grad, y;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int SLAB = ROWS / GROUPS * 64 * 2; // bytes of 64 columns of a group's rows
constexpr int SLABS = COLUMNS / 64;
constexpr int PARTS = 6; // of a slab: copied, waited for, and computed in four

// AGAIN: whether f(a) * b is written.
template <typename T, int FUNCTION, bool AGAIN>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
gradient_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  const Work work = begin_work();
  const Tiles tiles(sizes, work.pair);
  if (threadIdx.x < GROUP) {
    copy_all_tiles(work, tiles, maps.grad, [&](uint32_t to, int depth, int column, uint32_t barrier) {
      const int first = column * COLUMNS + work.block * (COLUMNS / BLOCKS);
      load_shared_tile(to, maps.weight, first, depth, barrier);
      load_shared_tile(to + WEIGHT_BYTES / 2, maps.weight, first + 64, depth, barrier);
    });
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr int COMPUTED = SLABS * PARTS, ALL = COMPUTED + (AGAIN ? WRITES : 0);
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    const uint32_t barrier = work.read + 8 * out.group;
    float d[128];
    uint32_t kept[64]; // of the tile before: the product, in 16 bits, and then f(a) * b
    int part = ALL, row = 0, column = 0;

    const auto copy_slab = [&](int slab) {
      if (out.thread == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        barrier_expect(barrier, 2 * SLAB);
        load_tile(out.at, maps.a, column + slab * 64, row, barrier);
        load_tile(out.at + SLAB, maps.b, column + slab * 64, row, barrier);
      }
    };
    const auto compute_eight = [&](int n) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float2 grad = unpack<T>(kept[2 * n + below]);
        const float2 a = unpack<T>(out.read(n % 8, below)), b = unpack<T>(out.read(8 + n % 8, below));
        const Found first = find<FUNCTION>(a.x), second = find<FUNCTION>(a.y);
        const float2 f = unpack<T>(pack<T>(first.value, second.value));
        out.write(n % 8, below, pack<T>(grad.x * b.x * first.slope, grad.y * b.y * second.slope));
        out.write(8 + n % 8, below, pack<T>(grad.x * f.x, grad.y * f.y));
        kept[2 * n + below] = pack<T>(f.x * b.x, f.y * b.y);
      }
    };
    const auto store_slab = [&](int slab) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      out.sync();
      if (out.thread == 0) {
        store_tile(maps.a_grad, out.at, column + slab * 64, row);
        store_tile(maps.b_grad, out.at + SLAB, column + slab * 64, row);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    };
    const auto do_one = [&] {
      if (part < COMPUTED) {
        const int slab = part / PARTS;
        if (part % PARTS == 0) {
          copy_slab(slab);
        } else if (part % PARTS == 2) {
          warp_wait(barrier, slab % 2); // an even number of phases to a tile
        }
        switch (part) {
#define PART(n) \
  case n: \
    if constexpr (n % PARTS > 1) { \
      compute_eight(n / PARTS * 8 + n % PARTS * 2 - 4); \
      compute_eight(n / PARTS * 8 + n % PARTS * 2 - 3); \
    } \
    break;
          PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7) PART(8) PART(9) PART(10) PART(11)
          PART(12) PART(13) PART(14) PART(15) PART(16) PART(17) PART(18) PART(19) PART(20) PART(21) PART(22) PART(23)
#undef PART
        }
        if (part % PARTS == PARTS - 1) {
          store_slab(slab);
        }
      } else {
        out.write_part(part - COMPUTED, kept, maps.y, column, row);
      }
      ++part;
    };
    const auto do_part = [&] {
      if (part < ALL) {
        do_one();
      }
    };
    const auto finish = [&](const Place& at) {
      while (part < ALL) { // there were fewer steps than parts
        do_one();
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        kept[i] = pack<T>(d[2 * i], d[2 * i + 1]);
      }
      row = (BLOCKS * at.row + work.block) * ROWS + out.group * (ROWS / GROUPS);
      column = at.column * COLUMNS;
      part = 0;
    };
    Stage stage{0, 0};
    multiply_tiles<T, true>(work, tiles, stage, out.group, out.thread, d, do_part, finish);
    while (part < ALL) {
      do_one();
    }
    out.wait();
  }
  end_work();
}

#else

template <typename T, int FUNCTION, bool AGAIN>
__global__ void gradient_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes) {
  __trap();
}

#endif

} // namespace

int gated_gradients(const GradientsArgs& args, Dtype dtype, const Device& device) {
  Maps maps;
  Describe describe(dtype);
  describe.x(maps.grad, args.grad, args.rows, args.depth);
  describe.turned_weight(maps.weight, args.weight, args.depth, args.columns);
  describe.result(maps.a, args.a, args.rows, args.columns);
  describe.result(maps.b, args.b, args.rows, args.columns);
  describe.result(maps.a_grad, args.a_grad, args.rows, args.columns);
  describe.result(maps.b_grad, args.b_grad, args.rows, args.columns);
  const bool again = args.y != nullptr;
  if (again) {
    describe.result(maps.y, args.y, args.rows, args.columns);
  }
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  const Sizes sizes{tiles_of(args.rows, BLOCKS * ROWS), tiles_of(args.columns, COLUMNS), static_cast<int>(args.depth)};
  return with_types(dtype, args.function, again, [&](auto type, auto function, auto also) {
    return start_tiles(gradient_tiles<decltype(type), decltype(function)::value, decltype(also)::value>, device, maps, sizes);
  });
}

} // namespace kernelhub
