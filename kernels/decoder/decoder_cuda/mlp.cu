// A gated MLP and what it is added to in one launch: each pair of blocks makes its tiles of the first products and goes on with those
// of the second, where it would wait for the last ones of others and begin anew.
//
// A tile of the second product needs all of its rows of the first's result. Whoever has written a tile of that counts it, for its
// rows, and who needs it waits for the count. All blocks are at work at the same time, and none waits ahead of its last tile
// of the first products: so what is waited for comes.

#include "added_tiles.cuh"
#include "gated_tiles.cuh"

namespace kernelhub {

namespace {

struct Maps {
  GatedMaps gated;
  AddedMaps added;
};
struct BothSizes {
  Sizes gated, added;
};

// `written`: for each block's rows, zero.
template <typename T, int FUNCTION, bool KEEP>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
mlp_tiles(const __grid_constant__ Maps maps, const __grid_constant__ BothSizes sizes, int* written) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Work work = begin_work();
  const Tiles gated(sizes.gated, work.pair);
  // The next in turn after the last of the first's has the first of these, so that pairs of blocks with one tile more of those have
  // one less of these.
  const Tiles added(sizes.added, (work.pair + work.pairs - gated.count % work.pairs) % work.pairs);
  if (threadIdx.x < GROUP) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Stage stage{0, 1};
      copy_tiles(work, gated, stage, maps.gated.x, [](int) {}, gated_weights(work, maps.gated));
      copy_tiles(
          work, added, stage, maps.added.x, [&](int row) { wait_until_written(written + row, gated.across); },
          added_weights(work, maps.added));
    } else if (threadIdx.x / 32 == 1) { // counts: a thread that makes products would keep the next ones waiting
      for (int tile = gated.first; tile < gated.count; tile += work.pairs) {
        hear();
        if (threadIdx.x == 32) {
          tell_written(written + BLOCKS * place(tile, gated.down, gated.across).row + work.block);
        }
        __syncwarp();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    Stage stage{0, 0};
    make_gated<T, FUNCTION, KEEP, true>(work, gated, stage, out, maps.gated);
    make_added<T>(work, added, stage, out, maps.added);
    out.wait();
  }
  end_work();
#else
  __trap();
#endif
}

} // namespace

int added_mlp(const GatedArgs& gated, const AddArgs& added, int* written, Dtype dtype, const Device& device) {
  Maps maps;
  Describe describe(dtype);
  describe_gated(describe, maps.gated, gated);
  describe_added(describe, maps.added, added);
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  const BothSizes sizes{gated_sizes(gated), added_sizes(added)};
  const size_t bytes = sizeof(int) * BLOCKS * sizes.gated.down;
  const cudaError_t error = cudaMemsetAsync(written, 0, bytes, static_cast<cudaStream_t>(device.stream));
  if (error != cudaSuccess) {
    return error;
  }
  const cudaError_t started = with_types(dtype, gated.function, gated.a != nullptr, [&](auto type, auto function, auto keep) {
    return start_tiles<true>(
        mlp_tiles<decltype(type), decltype(function)::value, decltype(keep)::value>, device, maps, sizes, written);
  });
  if (started != cudaErrorCooperativeLaunchTooLarge) {
    return started;
  }
  cudaGetLastError(); // this process may not have all of the GPU: then one after the other
  const int first = gated_product(gated, dtype, device);
  return first == cudaSuccess ? add_product(added, dtype, device) : first;
}

} // namespace kernelhub
