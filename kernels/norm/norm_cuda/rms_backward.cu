#include "backward.cuh"

namespace kernelhub {

BackwardPlan plan_backward(int64_t rows, int64_t n, Kind kind, Dtype dtype, bool wide, const Device& device) {
  const int V = dtype == FLOAT32 ? 4 : 8;
  const int64_t parts = wide ? n / V : n;
  BackwardPlan plan{};
  // 4 packs to a thread where with 2 a row takes more than half of a block's threads, but less than three quarters, and no second
  // row fits: 8192 x 5120 takes 70 us on an H200 so, not 82, but 16384 x 8192 225, not 195. Of layer norms and gated ones, which
  // compute more between reads, the more rows there are at once the better: 16384 x 8192 takes 205, not 237, and 345, not 382.
  const bool two = kind == LAYER || kind == GATED ? parts <= 256 : parts <= 512 || (parts >= 768 && parts <= 1024);
  plan.each = !wide || parts > 2048 ? 0 : parts <= 64 ? 1 : two ? 2 : 4;
  plan.stages = plan.each == 4 ? 2 : 3;
  if (plan.each > 0) {
    const int across = threads_for(static_cast<int>(parts), plan.each);
    // As many threads as there is room for, but not so many rows to a block that other blocks have none.
    const int room = std::min<int>(BACKWARD_THREADS, (device.shared - SUMS_BYTES) / ring_bytes(kind, plan.each, plan.stages)) / across;
    const int64_t fair = rows / device.multiprocessors, least = across < 32 ? 32 / across : 1;
    plan.across = static_cast<unsigned>(across);
    plan.together = static_cast<unsigned>(std::max<int64_t>(least, std::min<int64_t>({room, fair, across > 32 ? 15 : 1024})));
    const int64_t blocks = (rows + plan.together - 1) / plan.together;
    const int64_t at_once = device.multiprocessors * std::max<int64_t>(1, room / plan.together);
    plan.parts = std::min(blocks, at_once);
    if (room > 0) {
      return plan;
    }
  }
  plan.each = 0;
  plan.across = static_cast<unsigned>(parts < 4096 ? threads_for(static_cast<int>(parts), 4) : 1024);
  plan.together = plan.across >= 128 ? 1 : 128 / plan.across;
  const int64_t columns = (parts + 31) / 32, most = (4 * device.multiprocessors + columns - 1) / columns;
  plan.parts = rows < 8 * most ? (rows + 7) / 8 : most;
  return plan;
}

int rms_backward(
    const BackwardArgs& args, Kind kind, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device) {
  if (kind == GATED) {
    return rms_gated_backward(args, dtype, wide, plan, device);
  }
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return kind == ADD ? run_backward<T, ADD>(args, wide, plan, device) : run_backward<T, PLAIN>(args, wide, plan, device);
  });
}

} // namespace kernelhub
