// The loss' kernels against float64. Arguments: the op, a dtype, rows, classes, the smoothing and the z term's factor in thousandths,
// where the logits lie, and the GPU's multiprocessors. Ops are
//   losses     and what the gradient needs to know of each row
//   both       losses, and the gradient in a tensor of its own
//   in_place   losses, and the gradient where the logits were
//   gradients  of what `losses` kept
//   scale      all logits times a number
// Logits lie
//   dense   one row behind the other
//   halves  each in the first half of a row of twice as many
//   odd     each one element behind the one before: rows that are not aligned
// Every third row's label is the one to ignore, beginning with the second.

#include "launch.h"
#include "values.h"

using namespace kernelhub;
using namespace values;

namespace {

constexpr int64_t IGNORED = -100;

int64_t label_of(int64_t row, int64_t n) { return row % 3 == 1 ? IGNORED : (row * 7919 + n - 1) % n; }

} // namespace

int main(int count, char** arguments) {
  if (count != 9) {
    model::fail("arguments are missing");
  }
  const std::string op = arguments[1], lie = arguments[7];
  const Dtype dtype = std::string(arguments[2]) == "bfloat16" ? BFLOAT16 : FLOAT32;
  const int64_t rows = number(arguments[3]), n = number(arguments[4]), size = dtype == FLOAT32 ? 4 : 2;
  const double smoothing = number(arguments[5]) / 1000.0, z = number(arguments[6]) / 1000.0;
  const Device device{0, static_cast<int>(number(arguments[8])), 2048, 232448, 0, 90, nullptr};
  const int64_t stride = lie == "halves" ? 2 * n : lie == "odd" ? n + 1 : n;
  std::mt19937 random(1);
  std::normal_distribution<float> of;
  Matrix logits(rows, stride, dtype, [&](int64_t) { return 3.0f * of(random); });
  const bool wide = n * size % 16 == 0 && stride * size % 16 == 0;

  if (op == "scale") {
    const float by = 0.3f;
    const ScaleArgs args{logits.data(), rows * stride, &by};
    if (const int error = scale(args, dtype, lie != "odd", device); error != 0) { // any number of elements, if the first is aligned
      model::fail("the launch returned error %d", error);
    }
    const std::vector<double> got = logits.read();
    Worst worst;
    for (size_t i = 0; i < got.size(); ++i) {
      worst.see(got[i], logits.wide[i] * static_cast<double>(by), (dtype == BFLOAT16 ? 0x1p-8 : 0x1p-23) * 1.01 * std::abs(logits.wide[i]));
    }
    return worst.report("scale");
  }

  std::vector<int64_t> labels(rows);
  std::vector<float> found(rows, NAN), kept(2 * rows, NAN), scales(rows);
  for (int64_t row = 0; row < rows; ++row) {
    labels[row] = label_of(row, n);
    scales[row] = 0.25f + 0.5f * static_cast<float>(row % 4);
  }
  const bool in_place = op == "in_place", with_gradient = op != "losses";
  if (in_place && lie != "dense") {
    model::fail("gradients lie dense");
  }
  Matrix own(rows + 1, n, dtype); // with a row more, which nothing may write
  Matrix& grad = in_place ? logits : own;

  LossArgs args{};
  args.logits = {logits.data(), stride * size, 0};
  args.labels = labels.data();
  args.rows = rows, args.n = n, args.ignore_index = IGNORED;
  args.losses = found.data(), args.kept = kept.data(), args.scale = scales.data();
  args.smoothing = smoothing, args.z = z;
  args.grad = op == "both" || in_place ? grad.data() : nullptr;
  if (const int error = losses(args, dtype, wide, device); error != 0) {
    model::fail("the launch returned error %d", error);
  }
  if (op == "gradients") {
    args.grad = grad.data();
    if (const int error = gradients(args, dtype, wide, device); error != 0) {
      model::fail("the launch returned error %d", error);
    }
  }

  const std::vector<double> got = grad.read();
  const double unit = dtype == BFLOAT16 ? 0x1p-8 : 0x1p-22;
  Worst worst;
  for (int64_t row = 0; row < rows; ++row) {
    const double* const x = logits.wide.data() + row * stride;
    const bool ignored = labels[row] == IGNORED;
    double most = x[0], sum = 0.0, mean = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      most = std::max(most, x[i]);
      mean += x[i] / static_cast<double>(n);
    }
    for (int64_t i = 0; i < n; ++i) {
      sum += std::exp(x[i] - most);
    }
    const double log_sum = most + std::log(sum);
    const double plain = ignored ? 0.0 : (1.0 - smoothing) * (log_sum - x[labels[row]]) + smoothing * (log_sum - mean);
    worst.see(found[row], ignored ? 0.0 : plain + z * log_sum * log_sum, 1e-5 * (1.0 + std::abs(plain)));
    for (int64_t i = 0; with_gradient && i < n; ++i) {
      const double part = std::exp(x[i] - log_sum), here = i == labels[row] ? 1.0 - smoothing : 0.0;
      const double expected = scales[row] * (part * (1.0 + 2.0 * z * log_sum) - here - smoothing / static_cast<double>(n));
      worst.see(got[row * n + i], ignored ? 0.0 : expected, unit * (1.1 * std::abs(expected) + 1e-4) + 1e-7);
    }
  }
  for (size_t i = rows * n; with_gradient && i < got.size(); ++i) {
    if (!std::isnan(got[i])) {
      model::fail("something is written behind the last row");
    }
  }
  return worst.report(op.c_str());
}
