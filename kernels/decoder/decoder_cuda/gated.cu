// Two products of matrices and what follows them, in one pass: `gated_tiles.cuh` has how.

#include "gated_tiles.cuh"

namespace kernelhub {

namespace {

template <typename T, int FUNCTION, bool KEEP>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
gated_tiles(const __grid_constant__ GatedMaps maps, const __grid_constant__ Sizes sizes) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Work work = begin_work();
  const Tiles tiles(sizes, work.pair);
  if (threadIdx.x < GROUP) {
    copy_all_tiles(work, tiles, maps.x, gated_weights(work, maps));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    Stage stage{0, 0};
    make_gated<T, FUNCTION, KEEP, false>(work, tiles, stage, out, maps);
    out.wait();
  }
  end_work();
#else
  __trap();
#endif
}

} // namespace

int gated_product(const GatedArgs& args, Dtype dtype, const Device& device) {
  GatedMaps maps;
  Describe describe(dtype);
  describe_gated(describe, maps, args);
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  const Sizes sizes = gated_sizes(args);
  return with_types(dtype, args.function, args.a != nullptr, [&](auto type, auto function, auto keep) {
    return start_tiles(gated_tiles<decltype(type), decltype(function)::value, decltype(keep)::value>, device, maps, sizes);
  });
}

} // namespace kernelhub
