#include "backward.cuh"

namespace kernelhub {

int rms_gated_backward(
    const BackwardArgs& args, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device) {
  return for_dtype(dtype, [&](auto of) { return run_backward<decltype(of), GATED>(args, wide, plan, device); });
}

} // namespace kernelhub
