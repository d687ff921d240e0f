#include "../loss_cpu/loss.h"

#include "launch.h"
#include "operands.h"

namespace kernelhub {

namespace {

void check_on(const char* name, const char* what, const Tensor& tensor, const Tensor& logits) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == logits.get_device_index(), name,
      ": expected all tensors on one device; the ", what, " are not on the logits' GPU");
}

// Rows of logits and their labels, found to belong together; `labels` keeps theirs alive.
LossArgs args_of(
    const char* name, const Tensor& logits, const Tensor& given, int64_t ignore_index, double label_smoothing,
    double z_loss, Tensor& labels) {
  check_on(name, "logits", logits, logits);
  check_on(name, "labels", given, logits);
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long, name, ": the labels are not of dtype int64");
  bool fits = logits.dim() == given.dim() + 1;
  for (int64_t dim = 0; fits && dim < given.dim(); ++dim) {
    fits = logits.size(dim) == given.size(dim);
  }
  STD_TORCH_CHECK(fits, name, ": the labels have another shape than the logits without their last dimension");
  labels = torch::stable::contiguous(given);
  LossArgs args{};
  args.n = logits.size(logits.dim() - 1);
  args.rows = labels.numel();
  STD_TORCH_CHECK(args.n > 0, name, ": the logits are of no class");
  args.labels = static_cast<const int64_t*>(labels.data_ptr());
  args.ignore_index = ignore_index;
  args.smoothing = label_smoothing;
  args.z = z_loss;
  return args;
}

RowsOf rows_of(const Tensor& logits, int64_t rows) {
  return RowsOf(rows > AT_ONCE ? torch::stable::contiguous(logits) : logits);
}

bool whole(const LossArgs& args, const Tensor& logits) {
  return args.n * static_cast<int64_t>(logits.element_size()) % 16 == 0;
}

// A number for each row.
Tensor scales_of(const char* name, const Tensor& scale, const Tensor& logits, int64_t rows) {
  check_on(name, "scales", scale, logits);
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float && scale.numel() == rows, name, ": the scale is not one float32 for each row");
  return torch::stable::contiguous(scale);
}

// As `labels`, in float32.
Tensor new_losses(const Tensor& labels) {
  std::array<int64_t, 64> strides;
  const auto sizes = labels.sizes();
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  return new_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), ScalarType::Float, labels.get_device_index());
}

} // namespace

std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing, double z_loss) {
  constexpr const char* name = "cross_entropy";
  const Dtype dtype = dtype_of(logits, name);
  Tensor dense;
  LossArgs args = args_of(name, logits, labels, ignore_index, label_smoothing, z_loss, dense);
  Tensor losses = new_losses(labels), sums = new_row(2 * args.rows, ScalarType::Float, logits);
  if (args.rows == 0) {
    return {losses, sums};
  }
  const OnDevice device(logits);
  const RowsOf rows = rows_of(logits, args.rows);
  args.logits = rows.at;
  args.logits_leading = rows.leading;
  args.losses = static_cast<float*>(losses.data_ptr());
  args.kept = static_cast<float*>(sums.data_ptr());
  check_launch(kernelhub::losses(args, dtype, rows.wide && whole(args, logits), device));
  return {losses, sums};
}

Tensor cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& sums, int64_t ignore_index,
    double label_smoothing, double z_loss) {
  constexpr const char* name = "cross_entropy_backward";
  const Dtype dtype = dtype_of(logits, name);
  Tensor dense;
  LossArgs args = args_of(name, logits, labels, ignore_index, label_smoothing, z_loss, dense);
  const Tensor scales = scales_of(name, grad, logits, args.rows);
  check_on(name, "sums", sums, logits);
  STD_TORCH_CHECK(
      sums.scalar_type() == ScalarType::Float && sums.is_contiguous() && sums.numel() == 2 * args.rows, name,
      ": the sums are not those of the logits");
  Tensor made = new_tensor(logits);
  if (args.rows == 0) {
    return made;
  }
  const OnDevice device(logits);
  const RowsOf rows = rows_of(logits, args.rows);
  args.logits = rows.at;
  args.logits_leading = rows.leading;
  args.kept = static_cast<float*>(sums.data_ptr());
  args.scale = static_cast<const float*>(scales.data_ptr());
  args.grad = made.data_ptr();
  check_launch(gradients(args, dtype, rows.wide && aligned(args.grad) && whole(args, logits), device));
  return made;
}

Tensor cross_entropy_gradient_(
    const Tensor& logits, const Tensor& labels, const Tensor& scale, int64_t ignore_index, double label_smoothing,
    double z_loss) {
  constexpr const char* name = "cross_entropy_gradient_";
  const Dtype dtype = dtype_of(logits, name);
  Tensor dense;
  LossArgs args = args_of(name, logits, labels, ignore_index, label_smoothing, z_loss, dense);
  STD_TORCH_CHECK(logits.is_contiguous(), name, ": the logits, which are written to, are not contiguous");
  const Tensor scales = scales_of(name, scale, logits, args.rows);
  Tensor losses = new_losses(labels);
  if (args.rows == 0) {
    return losses;
  }
  const OnDevice device(logits);
  const RowsOf rows = rows_of(logits, args.rows);
  args.logits = rows.at;
  args.logits_leading = rows.leading;
  args.losses = static_cast<float*>(losses.data_ptr());
  args.scale = static_cast<const float*>(scales.data_ptr());
  args.grad = logits.data_ptr();
  check_launch(kernelhub::losses(args, dtype, rows.wide && whole(args, logits), device));
  return losses;
}

void scale_(const Tensor& x, const Tensor& by) {
  constexpr const char* name = "scale_";
  const Dtype dtype = dtype_of(x, name);
  check_on(name, "tensor", x, x);
  check_on(name, "factor", by, x);
  STD_TORCH_CHECK(x.is_contiguous(), name, ": the tensor, which is written to, is not contiguous");
  STD_TORCH_CHECK(
      by.scalar_type() == ScalarType::Float && by.numel() == 1, name, ": the factor is not one number in float32");
  if (x.numel() == 0) {
    return;
  }
  const OnDevice device(x);
  const ScaleArgs args{x.data_ptr(), x.numel(), static_cast<const float*>(by.data_ptr())};
  check_launch(scale(args, dtype, aligned(args.x), device));
}

} // namespace kernelhub
