// A product of matrices and what it is added to, in one pass, rounded once: when a tile's results are written, the registers and
// the shared memory that held them take what is added to the next one's, while its product is made.

#pragma once

#include "hopper.cuh"
#include "launch.h"

namespace kernelhub {

namespace {

struct AddedMaps {
  CUtensorMap x, weight, residual, y;
};

inline void describe_added(Describe& describe, AddedMaps& maps, const AddArgs& args) {
  describe.x(maps.x, args.x, args.rows, args.depth);
  describe.weight(maps.weight, args.weight, args.columns, args.depth);
  describe.result(maps.residual, args.residual, args.rows, args.columns);
  describe.result(maps.y, args.y, args.rows, args.columns);
}

inline Sizes added_sizes(const AddArgs& args) {
  return {tiles_of(args.rows, BLOCKS * ROWS), tiles_of(args.columns, COLUMNS), static_cast<int>(args.depth)};
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What `copy_tiles` asks for.
__device__ __forceinline__ auto added_weights(const Work& work, const AddedMaps& maps) {
  return [&](uint32_t to, int depth, int column, uint32_t barrier) {
    load_shared_tile(to, maps.weight, depth, column * COLUMNS + work.block * (COLUMNS / BLOCKS), barrier);
  };
}

// A group's work.
template <typename T>
__device__ __forceinline__ void make_added(
    const Work& work, const Tiles& tiles, Stage& stage, const Out& out, const AddedMaps& maps) {
  constexpr int READS = 8; // parts in which what is added is read, one with each step
  constexpr int ALL = WRITES + READS;
  constexpr int HALF = ROWS / GROUPS * OUT_COLUMNS * 2; // bytes that a group has copied at a time
  float d[128];
  uint32_t kept[64]; // of the tile before, and then what is added to this one
  int part = WRITES, tile = tiles.first, row = 0, column = 0;
  const uint32_t barrier = work.read + 8 * out.group;

  // Of a tile's columns the first or the second half.
  const auto copy_half = [&](int half) {
    if (out.thread == 0) {
      barrier_expect(barrier, HALF);
      load_tile(out.at, maps.residual, column + half * OUT_COLUMNS, row, barrier);
      load_tile(out.at + HALF / 2, maps.residual, column + half * OUT_COLUMNS + 64, row, barrier);
    }
  };
  const auto read_quarter = [&](int quarter) {
    warp_wait(barrier, quarter / 2); // two phases to a tile
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      kept[16 * quarter + i] = out.read((8 * quarter + i / 2) % 16, i % 2);
    }
  };
  const auto do_one = [&] {
    if (part < WRITES) {
      out.write_part(part, kept, maps.y, column, row);
    } else {
      switch (part - WRITES) {
        case 1: { // at 0, 2 and 5 what is copied has time
          const Place at = place(tile, tiles.down, tiles.across);
          row = (BLOCKS * at.row + work.block) * ROWS + out.group * (ROWS / GROUPS);
          column = at.column * COLUMNS;
          out.begin();
          copy_half(0);
          break;
        }
        case 3:
          read_quarter(0);
          break;
        case 4:
          read_quarter(1);
          out.sync();
          copy_half(1);
          break;
        case 6:
          read_quarter(2);
          break;
        case 7:
          read_quarter(3);
          break;
      }
    }
    ++part;
  };
  const auto do_part = [&] {
    if (part < ALL) {
      do_one();
    }
  };
  const auto finish = [&](const Place&) {
    while (part < ALL) { // there were fewer steps than parts
      do_one();
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float2 two = unpack<T>(kept[i]);
      kept[i] = pack<T>(d[2 * i] + two.x, d[2 * i + 1] + two.y);
    }
    tile += work.pairs;
    part = 0;
  };
  multiply_tiles<T>(work, tiles, stage, out.group, out.thread, d, do_part, finish);
  while (part < WRITES) {
    do_one();
  }
}

#endif

} // namespace

} // namespace kernelhub
