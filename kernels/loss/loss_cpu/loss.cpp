#include "loss.h"

#include <cmath>
#include <cstring>

#include "losses.h"
#include "operands.h"

namespace kernelhub {

namespace {

const Losses& losses_in_use() {
  return losses_of(static_cast<Level>(level_in_use().load(std::memory_order_relaxed)));
}

// Rows of logits and their labels, found to belong together.
struct Problem {
  const char* name;
  Dtype dtype;
  int64_t rows, n, ignore_index;
  Tensor labels;
  double smoothing, z;

  int64_t label(int64_t row) const { return static_cast<const int64_t*>(labels.data_ptr())[row]; }
  bool ignored(int64_t row) const { return label(row) == ignore_index; }
};

Problem problem_of(
    const char* name, const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing,
    double z_loss) {
  STD_TORCH_CHECK(logits.is_cpu(), name, ": expected all tensors on one device; the logits are not on the CPU");
  STD_TORCH_CHECK(labels.is_cpu(), name, ": expected all tensors on one device; the labels are not on the CPU");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, name, ": the labels are not of dtype int64");
  bool fits = logits.dim() == labels.dim() + 1;
  for (int64_t dim = 0; fits && dim < labels.dim(); ++dim) {
    fits = logits.size(dim) == labels.size(dim);
  }
  STD_TORCH_CHECK(fits, name, ": the labels have another shape than the logits without their last dimension");
  const int64_t n = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(n > 0, name, ": the logits are of no class");
  Problem of{
      name, dtype_of(logits, name), labels.numel(), n, ignore_index, torch::stable::contiguous(labels), label_smoothing,
      z_loss};
  for (int64_t row = 0; row < of.rows; ++row) {
    const int64_t label = of.label(row);
    STD_TORCH_CHECK(
        label == ignore_index || (label >= 0 && label < n), name, ": label ", label, " is out of bounds: expected 0 to ",
        n - 1, ", or the index to ignore, ", ignore_index);
  }
  return of;
}

// What the gradient of a row is made of: its largest logit, and 1 / sum(exp(x - most)).
struct Kept {
  float most, inverse;
};

// In float64: a handful of operations for each row.
float loss_of(const Problem& of, const Sums& sums, float at_label, Kept& kept) {
  // Nothing but -inf has no largest: 0 / 0 in the formula.
  const double total = sums.most == -std::numeric_limits<float>::infinity() ? std::nan("") : sums.total;
  kept = {sums.most, static_cast<float>(1.0 / total)};
  // Beside large logits the logarithm would be lost, so it is added last.
  const double log_total = std::log(total);
  double loss = (static_cast<double>(sums.most) - at_label) + log_total;
  if (of.smoothing != 0.0) {
    const double over_all = log_total - sums.plain / static_cast<double>(of.n);
    loss = (1.0 - of.smoothing) * loss + of.smoothing * over_all;
  }
  if (of.z != 0.0) {
    const double log_sum = sums.most + log_total;
    loss += of.z * log_sum * log_sum;
  }
  return static_cast<float>(loss);
}

float element(Dtype dtype, const void* row, int64_t i) {
  if (dtype == FLOAT32) {
    return static_cast<const float*>(row)[i];
  }
  const uint16_t bits = static_cast<const uint16_t*>(row)[i];
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  if (dtype == FLOAT16) {
    const uint32_t size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    if (size < 0x0400u) { // a multiple of 2**-24
      const float small = static_cast<float>(size) * 0x1p-24f;
      return sign ? -small : small;
    }
    wide = sign | (size >= 0x7c00u ? (size << 13) | 0x7f800000u : (size << 13) + (112u << 23));
  }
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

GradientRow gradient_row(const Problem& of, const Kept& kept, int64_t label, float scale) {
  GradientRow row{};
  row.n = of.n;
  row.label = label;
  row.most = kept.most;
  row.inverse = kept.inverse;
  if (of.z != 0.0) {
    const double log_sum = kept.most - std::log(static_cast<double>(kept.inverse));
    row.inverse = static_cast<float>(kept.inverse * (1.0 + 2.0 * of.z * log_sum));
  }
  row.scale = scale;
  row.less = static_cast<float>(scale * of.smoothing / static_cast<double>(of.n));
  row.more = static_cast<float>(1.0 - of.smoothing);
  return row;
}

} // namespace

int64_t use_level(int64_t level) {
  level_in_use() = static_cast<int>(std::clamp<int64_t>(level, PLAIN, detect_level()));
  return level_in_use();
}

std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing, double z_loss) {
  const Problem of = problem_of("cross_entropy", logits, labels, ignore_index, label_smoothing, z_loss);
  const auto run = losses_in_use().sums[of.dtype][label_smoothing != 0.0];
  const RowsOf rows(logits);
  const Tensor losses = new_tensor(labels, ScalarType::Float), sums = new_row(2 * of.rows, ScalarType::Float);
  float* out = static_cast<float*>(losses.data_ptr());
  Kept* kept = static_cast<Kept*>(sums.data_ptr());
  for_rows(of.rows, of.n, [&](int64_t row) {
    if (of.ignored(row)) {
      out[row] = 0.0f;
      kept[row] = {0.0f, 0.0f};
      return;
    }
    const void* x = rows[row];
    out[row] = loss_of(of, run(x, of.n), element(of.dtype, x, of.label(row)), kept[row]);
  });
  return {losses, sums};
}

Tensor cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& sums, int64_t ignore_index,
    double label_smoothing, double z_loss) {
  constexpr const char* name = "cross_entropy_backward";
  const Problem of = problem_of(name, logits, labels, ignore_index, label_smoothing, z_loss);
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.scalar_type() == ScalarType::Float && grad.numel() == of.rows, name,
      ": the gradient is not one of the losses");
  STD_TORCH_CHECK(
      sums.is_cpu() && sums.scalar_type() == ScalarType::Float && sums.is_contiguous() && sums.numel() == 2 * of.rows,
      name, ": the sums are not those of the logits");
  const auto run = losses_in_use().gradient[of.dtype];
  const RowsOf rows(logits);
  const Tensor dense = torch::stable::contiguous(grad), made = new_tensor(logits, logits.scalar_type());
  const float* scales = static_cast<const float*>(dense.data_ptr());
  const Kept* kept = static_cast<const Kept*>(sums.data_ptr());
  char* out = static_cast<char*>(made.data_ptr());
  const int64_t bytes = of.n * static_cast<int64_t>(logits.element_size());
  for_rows(of.rows, of.n, [&](int64_t at) {
    if (of.ignored(at)) {
      std::memset(out + at * bytes, 0, static_cast<size_t>(bytes));
      return;
    }
    GradientRow row = gradient_row(of, kept[at], of.label(at), scales[at]);
    row.x = rows[at];
    row.grad = out + at * bytes;
    run(row);
  });
  return made;
}

Tensor cross_entropy_gradient_(
    const Tensor& logits, const Tensor& labels, const Tensor& scale, int64_t ignore_index, double label_smoothing,
    double z_loss) {
  constexpr const char* name = "cross_entropy_gradient_";
  const Problem of = problem_of(name, logits, labels, ignore_index, label_smoothing, z_loss);
  STD_TORCH_CHECK(logits.is_contiguous(), name, ": the logits, which are written to, are not contiguous");
  STD_TORCH_CHECK(
      scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.numel() == of.rows, name,
      ": the scale is not one float32 for each row");
  const auto sums = losses_in_use().sums[of.dtype][label_smoothing != 0.0];
  const auto run = losses_in_use().gradient[of.dtype];
  const Tensor losses = new_tensor(labels, ScalarType::Float), dense = torch::stable::contiguous(scale);
  const float* scales = static_cast<const float*>(dense.data_ptr());
  float* out = static_cast<float*>(losses.data_ptr());
  char* data = static_cast<char*>(logits.data_ptr());
  const int64_t bytes = of.n * static_cast<int64_t>(logits.element_size());
  for_rows(of.rows, of.n, [&](int64_t at) {
    char* x = data + at * bytes;
    if (of.ignored(at)) {
      std::memset(x, 0, static_cast<size_t>(bytes));
      out[at] = 0.0f;
      return;
    }
    const int64_t label = of.label(at);
    Kept kept;
    out[at] = loss_of(of, sums(x, of.n), element(of.dtype, x, label), kept);
    GradientRow row = gradient_row(of, kept, label, scales[at]);
    row.x = x;
    row.grad = x;
    run(row);
  });
  return losses;
}

} // namespace kernelhub
