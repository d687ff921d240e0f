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

// Rows that lie one after another. Asked for by a tensor's functions, an address takes 15 ns, a fifth of what a row of 256
// does.
class DenseRows {
 public:
  DenseRows(const Tensor& dense, int64_t n)
      : data_(static_cast<char*>(dense.data_ptr())), bytes_(n * static_cast<int64_t>(dense.element_size())) {}
  DenseRows(const void* data, const Contiguous& of)
      : data_(static_cast<char*>(const_cast<void*>(data))), bytes_(of.n * (of.dtype == FLOAT32 ? 4 : 2)) {}

  void* operator[](int64_t row) const { return data_ + row * bytes_; }

 private:
  char* data_;
  int64_t bytes_;
};

float offset_of(Form form) {
  return form == ZERO_CENTERED ? 1.0f : -0.0f;
}

// Rows of up to as many elements are finished in the course of the next. Of longer ones, two do not lie in the first cache.
constexpr int64_t SHORT = 4096;

// `part(begin, end)` for parts of the rows of n elements, none of them empty, by as many threads as pay.
template <typename Part>
void for_parts(Shape shape, const Part& part) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(shape.n, 1));
  if (shape.rows > grain) {
    torch::stable::parallel_for(0, shape.rows, grain, part);
  } else if (shape.rows > 0) {
    part(0, shape.rows);
  }
}

// Rows with memory for each thread: for scratch, and for sums of rows over all rows, such as a weight's gradient. There is
// one part of the sums for each thread, and in each part sums of 32 rows at a time, so that rounding errors grow with the
// number of sums and not of rows.
class RowSums {
 public:
  static constexpr int64_t TOGETHER = 32;

  // `sums` sums of n elements each, and `scratch` rows of n floats.
  RowSums(Shape shape, int64_t sums, int64_t scratch) : n_(shape.n), width_(shape.n * sums), rows_(shape.rows) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(shape.n, 1));
    parts_ = std::max<int64_t>(1, std::min<int64_t>(threads, shape.rows / grain));
    each_ = (shape.rows + parts_ - 1) / parts_;
    // Side by side in a cache line, parts would be waited for.
    stride_ = (2 * width_ + scratch * n_) / 16 * 16 + 32;
    memory_.resize(static_cast<size_t>(parts_ * stride_));
  }

  // `each(row, sums, scratch)` adds its row to `sums`.
  template <typename Each>
  void run(const Rows& rows, const Each& each) {
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        float *total = &memory_[at * stride_], *some = total + width_, *scratch = some + width_;
        const int64_t last = std::min(rows_, (at + 1) * each_);
        for (int64_t row = at * each_; row < last;) {
          std::fill(some, some + width_, 0.0f);
          for (const int64_t stop = std::min(last, row + TOGETHER); row < stop; ++row) {
            each(row, some, scratch);
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
      rows.add(memory_.data(), &memory_[at * stride_], width_);
    }
  }

  const float* data() const { return memory_.data(); }

 private:
  int64_t n_, width_, rows_, parts_, each_, stride_;
  std::vector<float> memory_;
};

// Rows in float32: as they are, or widened into a row of scratch.
class Widened {
 public:
  Widened(const Rows& rows, Dtype dtype, int64_t n) : widen_(rows.widen[dtype]), narrow_(rows.narrow[dtype]), n_(n) {
    wide_ = dtype == FLOAT32;
  }

  // Rows of scratch that are needed for as many rows.
  int64_t scratch(int64_t count) const { return wide_ ? 0 : count; }

  // `scratch` is moved on behind what was taken of it.
  const float* read(const void* row, float*& scratch) const {
    if (wide_) {
      return static_cast<const float*>(row);
    }
    float* to = take(scratch);
    widen_(to, row, n_);
    return to;
  }

  // Where a row is computed that goes to `row`.
  float* write(void* row, float*& scratch) const { return wide_ ? static_cast<float*>(row) : take(scratch); }

  void done(void* row, const float* made) const {
    if (!wide_) {
      narrow_(row, made, n_);
    }
  }

 private:
  float* take(float*& scratch) const {
    float* taken = scratch;
    scratch += n_;
    return taken;
  }

  void (*widen_)(float*, const void*, int64_t);
  void (*narrow_)(void*, const float*, int64_t);
  int64_t n_;
  bool wide_;
};

// One row that all rows have in common, in float32.
class WideRow {
 public:
  WideRow(const Widened& wide, const void* row, int64_t n) : memory_(static_cast<size_t>(wide.scratch(n))) {
    float* scratch = memory_.data();
    row_ = wide.read(row, scratch);
  }

  const float* data() const { return row_; }

 private:
  std::vector<float> memory_;
  const float* row_;
};

Tensor narrowed(const Rows& rows, const float* from, int64_t n, const Tensor& like, Dtype dtype) {
  Tensor made = new_row(n, like.scalar_type());
  rows.narrow[dtype](made.data_ptr(), from, n);
  return made;
}

// Rows of x + residual, each finished in the course of the next.
template <typename Inputs>
void add_rms_rows(
    RmsRow row, const Rows& rows, int dtype, bool first, int64_t begin, int64_t end, const Inputs& inputs,
    const Inputs& residuals, const DenseRows& sums, const DenseRows& results) {
  const auto run = rows.add_rms[dtype][first];
  const auto last = rows.last_rms[dtype][first];
  for (int64_t at = begin; at < end; ++at) {
    row.x = inputs[at];
    row.residual = residuals[at];
    row.sum = sums[at];
    row.scale = run(row);
    row.before = row.sum;
    row.y = results[at];
    if (at + 1 == end || row.n > SHORT) {
      last(row);
      row.before = nullptr;
    }
  }
}

template <typename Inputs>
void layer_rows(
    LayerRow row, const Rows& rows, int dtype, int64_t begin, int64_t end, const Inputs& inputs, const DenseRows& results) {
  const auto run = rows.layer[dtype];
  const auto last = rows.last_layer[dtype];
  for (int64_t at = begin; at < end; ++at) {
    row.x = inputs[at];
    row.found = run(row);
    row.before = row.x;
    row.y = results[at];
    if (at + 1 == end || row.n > SHORT) {
      last(row);
      row.before = nullptr;
    }
  }
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
  const Form of = form_of(name, form);
  const Rows& rows = rows_in_use();
  const Dtype dtype = dtype_of(x, name);
  const auto run = rows.rms[dtype][of == CAST_FIRST];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type());
  const DenseRows results(y, shape.n);
  RmsRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  first.offset = offset_of(of);
  for_rows(shape.rows, shape.n, [&](int64_t at) {
    RmsRow row = first;
    row.x = inputs[at];
    row.y = results[at];
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
  const Form of = form_of(name, form);
  const Rows& rows = rows_in_use();
  const Dtype dtype = dtype_of(x, name);
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), residuals(residual), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type()), sum = new_tensor(x, x.scalar_type());
  const DenseRows results(y, shape.n), sums(sum, shape.n);
  RmsRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  first.offset = offset_of(of);
  for_parts(shape, [&](int64_t begin, int64_t end) {
    add_rms_rows(first, rows, dtype, of == CAST_FIRST, begin, end, inputs, residuals, sums, results);
  });
  return {y, sum};
}

void run_rms_norm(const Contiguous& of, int64_t form) {
  const bool cast_first = form == CAST_FIRST;
  const Rows& rows = rows_in_use();
  const DenseRows inputs(of.x, of), residuals(of.residual, of), sums(of.sum, of), results(of.y, of);
  RmsRow row{};
  row.weight = of.weight;
  row.n = of.n;
  row.eps = static_cast<float>(of.eps);
  row.offset = offset_of(static_cast<Form>(form));
  if (of.residual != nullptr) {
    add_rms_rows(row, rows, of.dtype, cast_first, 0, of.rows, inputs, residuals, sums, results);
    return;
  }
  for (int64_t at = 0; at < of.rows; ++at) {
    row.x = inputs[at];
    row.y = results[at];
    rows.rms[of.dtype][cast_first](row);
  }
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
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), sum_grads(sum_grad ? *sum_grad : grad), inputs(x), weights(weight);
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  const DenseRows results(x_grad, shape.n);
  const auto run = rows.rms_backward[dtype];
  RmsBackwardRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  first.offset = offset_of(form_of(name, form));
  RowSums sums(shape, needs_weight ? 1 : 0, 0);
  sums.run(rows, [&](int64_t at, float* sum, float*) {
    RmsBackwardRow row = first;
    row.grad = grads[at];
    row.x = inputs[at];
    row.sum_grad = sum_grad ? sum_grads[at] : nullptr;
    row.x_grad = results[at];
    row.weight_grad = needs_weight ? sum : nullptr;
    run(row);
  });
  return {x_grad, narrowed(rows, sums.data(), needs_weight ? shape.n : 0, x, dtype)};
}

Tensor rms_norm_gated(
    const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t form, int64_t kind) {
  constexpr const char* name = "rms_norm_gated";
  check_input(name, x);
  check_same(name, "gate", gate, x);
  check_row(name, "weight", weight, x);
  STD_TORCH_CHECK(form == CAST_FIRST || (form == CAST_LAST && kind != SILU_FIRST), name, ": there is no such form");
  const Gate of = gate_of(name, kind);
  const Rows& rows = rows_in_use();
  const Dtype dtype = dtype_of(x, name);
  const auto run = of == SILU_FIRST ? rows.gated_first[dtype] : rows.gated[dtype][form == CAST_FIRST];
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), gates(gate), weights(weight);
  const Tensor y = new_tensor(x, x.scalar_type());
  const DenseRows results(y, shape.n);
  RmsRow first{};
  first.weight = weights[0];
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  first.offset = offset_of(CAST_FIRST);
  first.is_silu = of != SIGMOID;
  RowSums(shape, 0, of == SILU_FIRST ? 1 : 0).run(rows, [&](int64_t at, float*, float* scratch) {
    RmsRow row = first;
    row.x = inputs[at];
    row.gate = gates[at];
    row.y = results[at];
    row.scratch = scratch;
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
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), inputs(x), gates(gate), weights(weight);
  const Tensor x_grad = new_tensor(x, x.scalar_type()), gate_grad = new_tensor(x, x.scalar_type());
  const DenseRows results(x_grad, shape.n), gate_results(gate_grad, shape.n);
  const Widened wide(rows, dtype, shape.n);
  const WideRow wide_weight(wide, weights[0], shape.n);
  GatedBackwardRow first{};
  first.weight = wide_weight.data();
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  first.gate_kind = gate_of(name, kind);
  RowSums sums(shape, 1, 1 + wide.scratch(5));
  sums.run(rows, [&](int64_t at, float* sum, float* scratch) {
    GatedBackwardRow row = first;
    row.scratch = scratch;
    scratch += shape.n;
    row.grad = wide.read(grads[at], scratch);
    row.x = wide.read(inputs[at], scratch);
    row.gate = wide.read(gates[at], scratch);
    row.x_grad = wide.write(results[at], scratch);
    row.gate_grad = wide.write(gate_results[at], scratch);
    row.weight_grad = sum;
    rows.gated_backward(row);
    wide.done(results[at], row.x_grad);
    wide.done(gate_results[at], row.gate_grad);
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
  const Rows& rows = rows_in_use();
  const Dtype dtype = dtype_of(x, name);
  const Shape shape = shape_of(x);
  const RowsOf inputs(x), weights(weight ? *weight : x), biases(bias ? *bias : x);
  const Tensor y = new_tensor(x, x.scalar_type());
  const DenseRows results(y, shape.n);
  LayerRow first{};
  first.weight = weight ? weights[0] : nullptr;
  first.bias = bias ? biases[0] : nullptr;
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  for_parts(shape, [&](int64_t begin, int64_t end) {
    layer_rows(first, rows, dtype, begin, end, inputs, results);
  });
  return y;
}

void run_layer_norm(const Contiguous& of) {
  LayerRow row{};
  row.weight = of.weight;
  row.bias = of.bias;
  row.n = of.n;
  row.eps = static_cast<float>(of.eps);
  layer_rows(row, rows_in_use(), of.dtype, 0, of.rows, DenseRows(of.x, of), DenseRows(of.y, of));
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
  const Shape shape = shape_of(x);
  const RowsOf grads(grad), inputs(x), weights(weight ? *weight : x);
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  const DenseRows results(x_grad, shape.n);
  const auto run = rows.layer_backward[dtype];
  LayerBackwardRow first{};
  first.weight = weight ? weights[0] : nullptr;
  first.n = shape.n;
  first.eps = static_cast<float>(eps);
  RowSums sums(shape, int64_t{needs_weight} + int64_t{needs_bias}, 0);
  const int64_t bias_at = needs_weight ? shape.n : 0;
  sums.run(rows, [&](int64_t at, float* sum, float*) {
    LayerBackwardRow row = first;
    row.grad = grads[at];
    row.x = inputs[at];
    row.x_grad = results[at];
    row.weight_grad = needs_weight ? sum : nullptr;
    row.bias_grad = needs_bias ? sum + bias_at : nullptr;
    run(row);
  });
  return {
      x_grad, narrowed(rows, sums.data(), needs_weight ? shape.n : 0, x, dtype),
      narrowed(rows, sums.data() + bias_at, needs_bias ? shape.n : 0, x, dtype)};
}

} // namespace kernelhub
