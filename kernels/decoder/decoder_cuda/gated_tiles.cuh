// Two products of matrices and what follows them, f(a) * b, in one pass: of a tile's columns the first half are `gate`'s and
// the other half the same ones of `up`, so that a thread has a and b of the same elements.

#pragma once

#include "formulas.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace kernelhub {

namespace {

struct GatedMaps {
  CUtensorMap x, gate, up, y, a, b;
};

inline void describe_gated(Describe& describe, GatedMaps& maps, const GatedArgs& args) {
  describe.x(maps.x, args.x, args.rows, args.depth);
  describe.weight(maps.gate, args.gate, args.columns, args.depth);
  describe.weight(maps.up, args.up, args.columns, args.depth);
  describe.result(maps.y, args.y, args.rows, args.columns);
  if (args.a != nullptr) {
    describe.result(maps.a, args.a, args.rows, args.columns);
    describe.result(maps.b, args.b, args.rows, args.columns);
  }
}

inline Sizes gated_sizes(const GatedArgs& args) {
  return {tiles_of(args.rows, BLOCKS * ROWS), tiles_of(args.columns, OUT_COLUMNS), static_cast<int>(args.depth)};
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What `copy_tiles` asks for.
__device__ __forceinline__ auto gated_weights(const Work& work, const GatedMaps& maps) {
  return [&](uint32_t to, int depth, int column, uint32_t barrier) {
    load_shared_tile(to, work.block ? maps.up : maps.gate, depth, column * OUT_COLUMNS, barrier);
  };
}

// A group's work. KEEP: whether a and b are written too. TELLS: whether y is waited for in the same launch, see `mlp.cu`.
template <typename T, int FUNCTION, bool KEEP, bool TELLS>
__device__ __forceinline__ void make_gated(
    const Work& work, const Tiles& tiles, Stage& stage, const Out& out, const GatedMaps& maps) {
  // a and b by four eights of columns with a step, y by one: with two the next products waited for it, 1.5 % of all time.
  constexpr int ONE = KEEP ? 4 : 0, KEPT = 2 * ONE, WRITTEN = KEPT + OUT_COLUMNS / 8;
  constexpr int ALL = WRITTEN + (TELLS ? 3 : 0); // some steps later y is there
  const int at_once = (ALL + tiles.steps - 1) / tiles.steps;
  float d[128];
  uint32_t kept[64]; // a and b of the tile before, in 16 bits
  int part = ALL;
  Place before{};

  const auto write_kept = [&](int first, int eights) {
#pragma unroll
    for (int i = 0; i < 2 * eights; ++i) {
      out.write((first / 2 + i / 2) % 16, i % 2, kept[first + i]);
    }
  };
  const auto write_product = [&](int eight) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float2 x = unpack<T>(kept[2 * eight + below]), by = unpack<T>(kept[32 + 2 * eight + below]);
      const float2 f = unpack<T>(pack<T>(find<FUNCTION>(x.x).value, find<FUNCTION>(x.y).value));
      out.write(eight, below, pack<T>(f.x * by.x, f.y * by.y));
    }
  };
  const auto do_one = [&] {
    if (part == 0 || (KEEP && (part == ONE || part == KEPT))) {
      out.begin();
    }
    switch (part) {
#define PART(n) \
  case n: \
    if constexpr (n < KEPT) { \
      write_kept(8 * n, 4); \
    } else if constexpr (n < WRITTEN) { \
      write_product(n - KEPT); \
    } \
    break;
      PART(0) PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7) PART(8) PART(9) PART(10) PART(11)
      PART(12) PART(13) PART(14) PART(15) PART(16) PART(17) PART(18) PART(19) PART(20) PART(21) PART(22) PART(23)
#undef PART
    }
    ++part;
    if (part == WRITTEN || (KEEP && (part == ONE || part == KEPT))) {
      const int row = (BLOCKS * before.row + work.block) * ROWS + out.group * (ROWS / GROUPS);
      out.end(part == WRITTEN ? maps.y : part == ONE ? maps.a : maps.b, before.column * OUT_COLUMNS, row);
    }
    if (TELLS && part == ALL) {
      out.tell();
    }
  };
  const auto do_part = [&] {
    for (int i = 0; i < at_once; ++i) {
      if (part < ALL) {
        do_one();
      }
    }
  };
  const auto finish = [&](const Place& at) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      kept[i] = pack<T>(d[2 * i], d[2 * i + 1]);
    }
    before = at;
    part = 0;
  };
  multiply_tiles<T>(work, tiles, stage, out.group, out.thread, d, do_part, finish);
  while (part < ALL) {
    do_one();
  }
}

#endif

} // namespace

} // namespace kernelhub
