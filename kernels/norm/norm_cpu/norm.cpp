#include "norm.h"

#include <vector>

#include "operands.h"
#include "rows.h"

namespace kernelhub {

namespace {

const Rows& rows_in_use() {
  return rows_of(static_cast<Level>(level_in_use().load(std::memory_order_relaxed)));
}

void check_row(const char* name, const char* what, const Tensor& row, const Tensor& x) {
  STD_TORCH_CHECK(row.is_cpu(), name, ": expected all tensors on one device; the ", what, " is not on the CPU");
  STD_TORCH_CHECK(row.dim() == 1, name, ": the ", what, " has ", row.dim(), " dimensions; expected one, the input's last");
  STD_TORCH_CHECK(
      row.size(0) == x.size(x.dim() - 1), name, ": the ", what, " has ", row.size(0),
      " elements; expected as many as the input's last dimension, ", x.size(x.dim() - 1));
  STD_TORCH_CHECK(row.scalar_type() == x.scalar_type(), name, ": the ", what, " has another dtype than the input");
}

void check_input(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected all tensors on one device; the input is not on the CPU");
  STD_TORCH_CHECK(x.dim() > 0, name, ": the input has no dimension");
}

Form form_of(const char* name, int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form < FORMS, name, ": form is ", form, "; expected 0, 1 or 2");
  return static_cast<Form>(form);
}

Gate gate_of(const char* name, int64_t gate) {
  STD_TORCH_CHECK(gate == SILU || gate == SIGMOID || gate == SILU_FIRST, name, ": gate is ", gate, "; expected 1, 2 or 3");
  return static_cast<Gate>(gate);
}

struct Shape {
  int64_t rows, n;
};

Shape shape_of(const Tensor& x) {
  const int64_t n = x.size(x.dim() - 1);
  return {n == 0 ? 0 : x.numel() / n, n};
}

char* row_at(const Tensor& dense, int64_t row, int64_t n) {
  return static_cast<char*>(dense.data_ptr()) + row * n * static_cast<int64_t>(dense.element_size());
}

// Sums of rows over all rows, such as a weight's gradient: one part for each thread, and in each part sums of 32 rows
// at a time, so that rounding errors grow with the number of sums and not of rows.
class RowSums {
 public:
  static constexpr int64_t TOGETHER = 32;

  // `count` sums of n elements each.
  RowSums(Shape shape, int64_t count) : width_(shape.n * count) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(shape.n, 1));
    parts_ = std::max<int64_t>(1, std::min<int64_t>(threads, shape.rows / grain));
    each_ = (shape.rows + parts_ - 1) / parts_;
    rows_ = shape.rows;
    sums_.resize(static_cast<size_t>(2 * parts_ * width_));
  }

  // `each(row, sums)` adds its row to `sums`.
  template <typename Each>
  void run(const Rows& rows, const Each& each) {
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        float* total = &sums_[2 * at * width_];
        float* some = total + width_;
        const int64_t last = std::min(rows_, (at + 1) * each_);
        for (int64_t row = at * each_; row < last;) {
          std::fill(some, some + width_, 0.0f);
          for (const int64_t stop = std::min(last, row + TOGETHER); row < stop; ++row) {
            each(row, some);
          }
          rows.add(total, some, width_);
        }
      }
    };
    if (parts_ == 1) {
      part(0, 1);
    } else {
      torch::stable::parallel_for(0, parts_, 1, part);
    }
    for (int64_t at = 1; at < parts_; ++at) {
      rows.add(sums_.data(), &sums_[2 * at * width_], width_);
    }
  }

  const float* data() const { return sums_.data(); }

 private:
  int64_t width_, parts_, each_, rows_;
  std::vector<float> sums_;
};

Tensor narrowed(const Rows& rows, const float* from, int64_t n, const Tensor& like, Dtype dtype) {
  Tensor made = new_row(n, like.scalar_type());
  rows.narrow[dtype](made.data_ptr(), from, n);
  return made;
}

} // namespace

int64_t use_level(int64_t level) {
  level_in_use() = static_cast<int>(std::clamp<int64_t>(level, PLAIN, detect_level()));
  return level_in_use();
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t form) {
  constexpr const char* name = "rms_norm";
  check_input(name, x);
  check_row(name, "weight", weight, x);
  const auto run = rows_in_use().rms[dtype_of(x, name)][form_of(name, form)];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type());
  char* out = static_cast<char*>(y.data_ptr());
  const int64_t bytes = shape.n * static_cast<int64_t>(y.element_size());
  RmsRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  for_rows(shape.rows, shape.n, [&](int64_t at) {
    RmsRow row = first;
    row.x = inputs[at];
    row.y = out + at * bytes;
    run(row);
  });
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, int64_t form) {
  constexpr const char* name = "add_rms_norm";
  check_input(name, x);
  check_same(name, "residual", residual, x);
  check_row(name, "weight", weight, x);
  const auto run = rows_in_use().add_rms[dtype_of(x, name)][form_of(name, form)];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), residuals(residual), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type()), sum = new_tensor(x, x.scalar_type());
  RmsRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  for_rows(shape.rows, shape.n, [&](int64_t at) {
    RmsRow row = first;
    row.x = inputs[at];
    row.residual = residuals[at];
    row.y = row_at(y, at, shape.n);
    row.sum = row_at(sum, at, shape.n);
    run(row);
  });
  return {y, sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& sum_grad, const Tensor& x, const Tensor& weight, double eps,
    int64_t form, bool needs_weight) {
  constexpr const char* name = "rms_norm_backward";
  check_input(name, x);
  check_same(name, "gradient", grad, x);
  check_row(name, "weight", weight, x);
  if (sum_grad) {
    check_same(name, "gradient of the sum", *sum_grad, x);
  }
  const Dtype dtype = dtype_of(x, name);
  const Rows& rows = rows_in_use();
  const auto run = rows.rms_backward[dtype][form_of(name, form)];
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), sum_grads(sum_grad ? *sum_grad : grad), inputs(x), weights(weight);
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  const auto work = [&](int64_t at, float* weight_grad) {
    RmsBackwardRow row{};
    row.grad = grads[at];
    row.sum_grad = sum_grad ? sum_grads[at] : nullptr;
    row.x = inputs[at];
    row.weight = weights[0];
    row.x_grad = row_at(x_grad, at, shape.n);
    row.weight_grad = weight_grad;
    row.n = shape.n;
    row.eps = static_cast<float>(eps);
    run(row);
  };
  if (!needs_weight) {
    for_rows(shape.rows, shape.n, [&](int64_t at) { work(at, nullptr); });
    return {x_grad, new_row(0, x.scalar_type())};
  }
  RowSums sums(shape, 1);
  sums.run(rows, work);
  return {x_grad, narrowed(rows, sums.data(), shape.n, x, dtype)};
}

Tensor rms_norm_gated(
    const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t form, int64_t kind) {
  constexpr const char* name = "rms_norm_gated";
  check_input(name, x);
  check_same(name, "gate", gate, x);
  check_row(name, "weight", weight, x);
  STD_TORCH_CHECK(form == CAST_FIRST || (form == CAST_LAST && kind != SILU_FIRST), name, ": there is no such form");
  const auto run = rows_in_use().gated[dtype_of(x, name)][form][gate_of(name, kind)];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), gates(gate), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type());
  for_rows(shape.rows, shape.n, [&](int64_t at) {
    RmsRow row{};
    row.x = inputs[at];
    row.gate = gates[at];
    row.weight = weights[0];
    row.y = row_at(y, at, shape.n);
    row.n = shape.n;
    row.eps = static_cast<float>(eps);
    run(row);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t kind) {
  constexpr const char* name = "rms_norm_gated_backward";
  check_input(name, x);
  check_same(name, "gradient", grad, x);
  check_same(name, "gate", gate, x);
  check_row(name, "weight", weight, x);
  const Dtype dtype = dtype_of(x, name);
  const Rows& rows = rows_in_use();
  const auto run = rows.gated_backward[dtype][gate_of(name, kind)];
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), inputs(x), gates(gate), weights(weight);
  const Tensor x_grad = new_tensor(x, x.scalar_type()), gate_grad = new_tensor(x, x.scalar_type());
  RowSums sums(shape, 2); // the weight's gradient, and as much again for a row's scratch
  sums.run(rows, [&](int64_t at, float* sum) {
    GatedBackwardRow row{};
    row.grad = grads[at];
    row.x = inputs[at];
    row.gate = gates[at];
    row.weight = weights[0];
    row.x_grad = row_at(x_grad, at, shape.n);
    row.gate_grad = row_at(gate_grad, at, shape.n);
    row.weight_grad = sum;
    row.scratch = sum + shape.n;
    row.n = shape.n;
    row.eps = static_cast<float>(eps);
    run(row);
  });
  return {x_grad, gate_grad, narrowed(rows, sums.data(), shape.n, x, dtype)};
}

Tensor layer_norm(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  constexpr const char* name = "layer_norm";
  check_input(name, x);
  if (weight) {
    check_row(name, "weight", *weight, x);
  }
  if (bias) {
    check_row(name, "bias", *bias, x);
  }
  const auto run = rows_in_use().layer[dtype_of(x, name)];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), weights(weight ? *weight : x), biases(bias ? *bias : x);
  const Tensor y = new_tensor(x, x.scalar_type());
  for_rows(shape.rows, shape.n, [&](int64_t at) {
    LayerRow row{};
    row.x = inputs[at];
    row.weight = weight ? weights[0] : nullptr;
    row.bias = bias ? biases[0] : nullptr;
    row.y = row_at(y, at, shape.n);
    row.n = shape.n;
    row.eps = static_cast<float>(eps);
    run(row);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool needs_weight,
    bool needs_bias) {
  constexpr const char* name = "layer_norm_backward";
  check_input(name, x);
  check_same(name, "gradient", grad, x);
  if (weight) {
    check_row(name, "weight", *weight, x);
  }
  const Dtype dtype = dtype_of(x, name);
  const Rows& rows = rows_in_use();
  const auto run = rows.layer_backward[dtype];
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), inputs(x), weights(weight ? *weight : x);
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  const auto work = [&](int64_t at, float* sum) {
    LayerBackwardRow row{};
    row.grad = grads[at];
    row.x = inputs[at];
    row.weight = weight ? weights[0] : nullptr;
    row.x_grad = row_at(x_grad, at, shape.n);
    row.weight_grad = needs_weight ? sum : nullptr;
    row.bias_grad = needs_bias ? sum + shape.n : nullptr;
    row.n = shape.n;
    row.eps = static_cast<float>(eps);
    run(row);
  };
  if (!needs_weight && !needs_bias) {
    for_rows(shape.rows, shape.n, [&](int64_t at) { work(at, nullptr); });
    return {x_grad, new_row(0, x.scalar_type()), new_row(0, x.scalar_type())};
  }
  RowSums sums(shape, 2);
  sums.run(rows, work);
  return {
      x_grad, narrowed(rows, sums.data(), needs_weight ? shape.n : 0, x, dtype),
      narrowed(rows, sums.data() + shape.n, needs_bias ? shape.n : 0, x, dtype)};
}

} // namespace kernelhub
