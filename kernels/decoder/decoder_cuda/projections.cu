// An attention's projections of one input, q and k with Llama's rotary embedding, in one pass: the tiles' columns are q's, then
// k's, then v's. A thread has both elements of a pair, and turns them where they are.

#include "hopper.cuh"
#include "launch.h"

namespace kernelhub {

namespace {

struct Maps {
  CUtensorMap x, weights[3], results[3];
};

// Biases two elements at a time. The tables begin again after `period` rows.
struct Operands {
  const uint32_t* biases[3];
  const char* cos;
  const char* sin;
  uint32_t period;
  int columns[3];
  int ends[2]; // of q's and k's tiles
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int TABLE = ROWS / GROUPS * 64 * 2; // bytes of a table that a group has at a time: of 64 rows 32 pairs

// Not to be moved: where the compiler has all loads ahead, registers run out.
__device__ __forceinline__ uint32_t load_two(const uint32_t* from) {
  uint32_t two;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(two) : "l"(from));
  return two;
}

// 16 bytes into shared memory, without waiting.
__device__ __forceinline__ void copy_16(uint32_t to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// x * cos + other * sin of two elements, rounded after every operation, as kernels/rotary and PyTorch do it.
template <typename T>
__device__ __forceinline__ uint32_t turned(uint32_t x, uint32_t cos, uint32_t other, uint32_t sin) {
  using Two = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
  const auto two = [](const uint32_t& bits) { return *reinterpret_cast<const Two*>(&bits); };
  const Two sum = __hadd2_rn(__hmul2_rn(two(x), two(cos)), __hmul2_rn(two(other), two(sin)));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// HEAD: elements of a head.
template <typename T, int HEAD>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
rotary_tiles(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes, const __grid_constant__ Operands operands) {
  const Work work = begin_work();
  const Tiles tiles(sizes, work.pair);
  // Whose a tile's columns are, and which tile of those it is.
  const auto find = [&](int column, int& of) {
    of = column < operands.ends[0] ? 0 : column < operands.ends[1] ? 1 : 2;
    return of == 0 ? column : column - operands.ends[of - 1];
  };
  if (threadIdx.x < GROUP) {
    copy_all_tiles(work, tiles, maps.x, [&](uint32_t to, int depth, int column, uint32_t barrier) {
      int of;
      const int tile = find(column, of);
      load_shared_tile(to, maps.weights[of], depth, tile * COLUMNS + work.block * (COLUMNS / BLOCKS), barrier);
    });
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // Four parts for each 32 pairs of a head, and two in between in which their cos and sin are copied; those of the first, of
    // the next tile, after the writes.
    constexpr int TURNS = HEAD / 64 * 6 - 2, WRITTEN = TURNS + WRITES, ALL = WRITTEN + 2;
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    float d[128];
    uint32_t kept[64]; // of the tile before, in 16 bits
    int part = WRITTEN, next = work.pair, row = 0, of = 0, tile = 0;

    const auto first_row = [&](const Place& at) {
      return (BLOCKS * at.row + work.block) * ROWS + out.group * (ROWS / GROUPS);
    };
    // Of the group's rows from `first` on, in 16 bytes a time, as many from either half of a head.
    const auto copy_tables = [&](int first, int round) {
      const int eight = out.thread % 8;
#pragma unroll
      for (int i = 0; i < ROWS / GROUPS; i += GROUP / 8) {
        const int below = i + out.thread / 8;
        const uint32_t to = out.at + below * 128 + (eight * 16 ^ below % 8 * 16);
        const int64_t from = static_cast<int64_t>((first + below) % operands.period) * (HEAD * 2) + eight / 4 * HEAD +
            (round * 4 + eight % 4) * 16;
        copy_16(to, operands.cos + from);
        copy_16(to + TABLE, operands.sin + from);
      }
    };
    // Pairs of the n-th eight of each head's first half.
    const auto turn = [&](int n) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const uint32_t low_cos = out.read(n % 4, below), high_cos = out.read(4 + n % 4, below);
        const uint32_t low_sin = out.read(8 + n % 4, below) ^ 0x80008000u, high_sin = out.read(12 + n % 4, below);
#pragma unroll
        for (int head = 0; head < COLUMNS / HEAD; ++head) {
          const int first = 2 * (head * (HEAD / 8) + n) + below, second = first + HEAD / 8;
          const uint32_t a = kept[first], b = kept[second];
          kept[first] = turned<T>(a, low_cos, b, low_sin);
          kept[second] = turned<T>(b, high_cos, a, high_sin);
        }
      }
    };
    const auto do_one = [&] {
      if (part < TURNS) {
        if (part % 6 == 0) {
          asm volatile("cp.async.wait_all;" ::: "memory");
          out.sync();
        }
        switch (part) {
#define PART(n) \
  case n: \
    if constexpr (n < TURNS && n % 6 < 4) { \
      turn(n / 6 * 4 + n % 6); \
    } else if constexpr (n < TURNS && n % 6 == 4) { \
      out.sync(); \
      copy_tables(row, n / 6 + 1); \
    } \
    break;
          PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7) PART(8) PART(9) PART(10)
          PART(11) PART(12) PART(13) PART(14) PART(15) PART(16) PART(17) PART(18) PART(19) PART(20) PART(21)
#undef PART
        }
      } else if (part < WRITTEN) {
        out.write_part(part - TURNS, kept, maps.results[of], tile * COLUMNS, row);
      } else if (part == ALL - 1) { // a part later, when what was written has been copied
        const Place at = place(next, tiles.down, tiles.across);
        if (at.column < operands.ends[1]) {
          out.begin();
          copy_tables(first_row(at), 0);
        }
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
      row = first_row(at);
      tile = find(at.column, of);
      const uint32_t* const bias = operands.biases[of];
      if (bias != nullptr) {
        const int left = operands.columns[of] - tile * COLUMNS;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
          const float2 two = unpack<T>(8 * n < left ? load_two(bias + tile * (COLUMNS / 2) + 4 * n + out.thread % 4) : 0);
          d[4 * n] += two.x;
          d[4 * n + 1] += two.y;
          d[4 * n + 2] += two.x;
          d[4 * n + 3] += two.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        kept[i] = pack<T>(d[2 * i], d[2 * i + 1]);
      }
      next += work.pairs;
      part = of == 2 ? TURNS : 0;
    };
    Stage stage{0, 0};
    multiply_tiles<T>(work, tiles, stage, out.group, out.thread, d, do_part, finish);
    while (part < WRITTEN) {
      do_one();
    }
    out.wait();
  }
  end_work();
}

#else

template <typename T, int HEAD>
__global__ void rotary_tiles(
    const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes, const __grid_constant__ Operands operands) {
  __trap();
}

#endif

template <typename T>
cudaError_t start(const Maps& maps, const Sizes& sizes, const Operands& operands, int head_dim, const Device& device) {
  switch (head_dim) {
    case 64:
      return start_tiles(rotary_tiles<T, 64>, device, maps, sizes, operands);
    case 128:
      return start_tiles(rotary_tiles<T, 128>, device, maps, sizes, operands);
    default:
      return start_tiles(rotary_tiles<T, 256>, device, maps, sizes, operands);
  }
}

} // namespace

int rotary_projections(const ProjectionsArgs& args, Dtype dtype, const Device& device) {
  Maps maps;
  Operands operands{};
  Describe describe(dtype);
  describe.x(maps.x, args.x, args.rows, args.depth);
  int across = 0;
  for (int of = 0; of < 3; ++of) {
    describe.weight(maps.weights[of], args.weights[of], args.columns[of], args.depth);
    describe.result(maps.results[of], args.results[of], args.rows, args.columns[of]);
    operands.biases[of] = static_cast<const uint32_t*>(args.biases[of]);
    operands.columns[of] = static_cast<int>(args.columns[of]);
    across += tiles_of(args.columns[of], COLUMNS);
    if (of < 2) {
      operands.ends[of] = across;
    }
  }
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  operands.cos = static_cast<const char*>(args.cos);
  operands.sin = static_cast<const char*>(args.sin);
  operands.period = static_cast<uint32_t>(args.period);
  const Sizes sizes{tiles_of(args.rows, BLOCKS * ROWS), across, static_cast<int>(args.depth)};
  return dtype == BFLOAT16 ? start<__nv_bfloat16>(maps, sizes, operands, args.head_dim, device)
                           : start<__half>(maps, sizes, operands, args.head_dim, device);
}

} // namespace kernelhub
