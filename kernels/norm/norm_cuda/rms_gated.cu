#include "rms.cuh"

namespace kernelhub {

int rms_gated(const RmsArgs& args, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) { return run<decltype(of), GATED>(args, wide, device); });
}

} // namespace kernelhub
