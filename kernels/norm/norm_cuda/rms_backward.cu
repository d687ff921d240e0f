#include "backward.cuh"

namespace kernelhub {

BackwardPlan plan_backward(int64_t rows, int64_t n, Kind kind, Dtype dtype, bool wide, const Device& device) {
  const int V = dtype == FLOAT32 ? 4 : 8;
  const int64_t parts = wide ? n / V : n;
  BackwardPlan plan{};
  if (wide && parts <= 2048) {
    plan.each = parts <= 256 ? 1 : parts <= 512 ? 2 : 4;
    plan.across = static_cast<unsigned>(threads_for(static_cast<int>(parts), plan.each));
    plan.together = plan.across >= 256 ? 1 : 256 / plan.across;
    // As many blocks as have room, by the registers that `backward_rows` may use, but no more than rows need.
    const int64_t threads = static_cast<int64_t>(plan.across) * plan.together;
    const int64_t most = plan.each == 1 ? 1024 : plan.each == 2 ? 768 : 512;
    const int64_t room = device.multiprocessors * (most / threads);
    const int64_t blocks = (rows + plan.together - 1) / plan.together;
    plan.parts = blocks < room ? blocks : room;
  } else {
    plan.across = static_cast<unsigned>(parts < 4096 ? threads_for(static_cast<int>(parts), 4) : 1024);
    plan.together = plan.across >= 128 ? 1 : 128 / plan.across;
    const int64_t columns = (parts + 31) / 32, most = (4 * device.multiprocessors + columns - 1) / columns;
    plan.parts = rows < 8 * most ? (rows + 7) / 8 : most;
  }
  return plan;
}

int rms_backward(
    const BackwardArgs& args, Kind kind, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    switch (kind) {
      case ADD:
        return run_backward<T, ADD>(args, wide, plan, device);
      case GATED:
        return run_backward<T, GATED>(args, wide, plan, device);
      default:
        return run_backward<T, PLAIN>(args, wide, plan, device);
    }
  });
}

} // namespace kernelhub
