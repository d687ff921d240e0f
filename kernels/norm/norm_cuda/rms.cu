#include "rms.cuh"

namespace kernelhub {

int rms(const RmsArgs& args, Kind kind, Dtype dtype, bool wide, const Device& device) {
  if (kind == GATED) {
    return rms_gated(args, dtype, wide, device);
  }
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return kind == ADD ? run<T, ADD>(args, wide, device) : run<T, PLAIN>(args, wide, device);
  });
}

} // namespace kernelhub
