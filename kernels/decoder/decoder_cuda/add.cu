// A product of matrices and what it is added to, in one pass: `added_tiles.cuh` has how.

#include "added_tiles.cuh"

namespace kernelhub {

namespace {

template <typename T>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
add_tiles(const __grid_constant__ AddedMaps maps, const __grid_constant__ Sizes sizes) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Work work = begin_work();
  const Tiles tiles(sizes, work.pair);
  if (threadIdx.x < GROUP) {
    copy_all_tiles(work, tiles, maps.x, added_weights(work, maps));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Out out(work, threadIdx.x / GROUP - 1, threadIdx.x % GROUP);
    Stage stage{0, 0};
    make_added<T>(work, tiles, stage, out, maps);
    out.wait();
  }
  end_work();
#else
  __trap();
#endif
}

} // namespace

int add_product(const AddArgs& args, Dtype dtype, const Device& device) {
  AddedMaps maps;
  Describe describe(dtype);
  describe_added(describe, maps, args);
  if (describe.error != cudaSuccess) {
    return describe.error;
  }
  const Sizes sizes = added_sizes(args);
  return dtype == BFLOAT16 ? start_tiles(add_tiles<__nv_bfloat16>, device, maps, sizes)
                           : start_tiles(add_tiles<__half>, device, maps, sizes);
}

} // namespace kernelhub
