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

template <typename T, int FUNCTION>
cudaError_t start(const GatedMaps& maps, const Sizes& sizes, bool keep, const Device& device) {
  return keep ? start_tiles(gated_tiles<T, FUNCTION, true>, device, maps, sizes)
              : start_tiles(gated_tiles<T, FUNCTION, false>, device, maps, sizes);
}

template <typename T>
cudaError_t start(const GatedMaps& maps, const Sizes& sizes, bool keep, int function, const Device& device) {
  return function == SILU ? start<T, SILU>(maps, sizes, keep, device) : start<T, GELU_TANH>(maps, sizes, keep, device);
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
  const bool keep = args.a != nullptr;
  return dtype == BFLOAT16 ? start<__nv_bfloat16>(maps, sizes, keep, args.function, device)
                           : start<__half>(maps, sizes, keep, args.function, device);
}

} // namespace kernelhub
