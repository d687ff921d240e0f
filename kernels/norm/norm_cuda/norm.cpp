#include "../norm_cpu/norm.h"

#include "launch.h"
#include "operands.h"

namespace kernelhub {

namespace {

enum Form { CAST_FIRST = 0, CAST_LAST = 1, ZERO_CENTERED = 2, FORMS = 3 };

void check_input(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected all tensors on one device; the input is not on a GPU");
  STD_TORCH_CHECK(x.dim() > 0, name, ": the input has no dimension");
}

void check_form(const char* name, int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form < FORMS, name, ": form is ", form, "; expected 0, 1 or 2");
}

void check_gate(const char* name, int64_t gate) {
  STD_TORCH_CHECK(gate == SILU || gate == SIGMOID || gate == SILU_FIRST, name, ": gate is ", gate, "; expected 1, 2 or 3");
}

// A weight or a bias; a copy where its elements lie apart.
Tensor row_of(const char* name, const char* what, const Tensor& row, const Tensor& x) {
  check_device(name, what, row, x);
  STD_TORCH_CHECK(row.dim() == 1, name, ": the ", what, " has ", row.dim(), " dimensions; expected one, the input's last");
  const int64_t n = x.size(x.dim() - 1), found = row.size(0);
  STD_TORCH_CHECK(
      found == n, name, ": the ", what, " has ", found, " elements; expected as many as the input's last dimension, ", n);
  return row.is_contiguous() ? row : torch::stable::contiguous(row);
}

// What the args of all ops begin with.
template <typename Args>
Args begin(const Tensor& x, double eps) {
  Args args{};
  args.n = x.size(x.dim() - 1);
  args.rows = args.n == 0 ? 0 : x.numel() / args.n;
  args.inverse = 1.0f / static_cast<float>(args.n);
  args.eps = static_cast<float>(eps);
  return args;
}

bool whole(const Tensor& x, int64_t n) { return n * static_cast<int64_t>(x.element_size()) % 16 == 0; }

float offset_of(int64_t form) { return form == ZERO_CENTERED ? 1.0f : -0.0f; }

Tensor run_rms(
    const char* name, const Tensor& x, const Tensor* other, const Tensor& weight, double eps, int64_t form, int64_t gate,
    Kind kind, Tensor* sum) {
  const Dtype dtype = dtype_of(x, name);
  const Tensor weights = row_of(name, "weight", weight, x);
  Tensor y = new_tensor(x);
  RmsArgs args = begin<RmsArgs>(x, eps);
  if (args.rows == 0) {
    return y;
  }
  const OnDevice device(x);
  const RowsOf inputs(x);
  bool wide = whole(x, args.n) && inputs.wide;
  args.x = inputs.at;
  args.x_leading = inputs.leading;
  std::optional<RowsOf> others;
  if (other != nullptr) {
    others.emplace(*other);
    args.other = others->at;
    args.other_leading = others->leading;
    wide = wide && others->wide;
  }
  args.weight = weights.data_ptr();
  args.y = y.data_ptr();
  args.sum = sum != nullptr ? sum->data_ptr() : nullptr;
  args.offset = offset_of(form);
  args.rounds = form == CAST_FIRST;
  args.gate = static_cast<int>(gate);
  wide = wide && aligned(args.weight) && aligned(args.y) && aligned(args.sum);
  check_launch(rms(args, kind, dtype, wide, device));
  return y;
}

// The gradients of weight and bias, in the input's dtype; empty where they are not wanted.
struct RowGrads {
  Tensor weight, bias;
};

// Fills in the args' other operand, makes what is added up over the rows, runs, and adds up the parts.
RowGrads run_backward(
    const char* name, BackwardArgs args, Kind kind, const Tensor& grad, const Tensor& x, const Tensor* other,
    const Tensor* weight, bool needs_weight, bool needs_bias) {
  const Dtype dtype = dtype_of(x, name);
  RowGrads grads{new_row(needs_weight ? args.n : 0, x.scalar_type(), x), new_row(needs_bias ? args.n : 0, x.scalar_type(), x)};
  const OnDevice device(x);
  if (args.rows == 0) {
    for (const Tensor* of : {&grads.weight, &grads.bias}) {
      if (of->numel() > 0) {
        STD_CUDA_CHECK(cudaMemsetAsync(
            of->data_ptr(), 0, of->numel() * of->element_size(), static_cast<cudaStream_t>(device.stream)));
      }
    }
    return grads;
  }
  const RowsOf inputs(x), grads_in(grad);
  std::optional<RowsOf> others;
  args.x = inputs.at;
  args.x_leading = inputs.leading;
  args.grad = grads_in.at;
  args.grad_leading = grads_in.leading;
  bool wide = whole(x, args.n) && inputs.wide && grads_in.wide;
  if (other != nullptr) {
    others.emplace(*other);
    args.other = others->at;
    args.other_leading = others->leading;
    wide = wide && others->wide;
  }
  args.weight = weight != nullptr ? weight->data_ptr() : nullptr;
  wide = wide && aligned(args.weight) && aligned(args.x_grad) && aligned(args.gate_grad);
  const BackwardPlan plan = plan_backward(args.rows, args.n, kind, dtype, wide, device);
  const int64_t results = needs_weight + needs_bias, statistics = plan.each == 0 && results > 0 ? 2 * args.rows : 0;
  // All that is needed beyond the results: per block one row of float32 sums for each, and two numbers per row.
  const Tensor scratch = new_row(results * plan.parts * args.n + statistics, ScalarType::Float, x);
  float* next = static_cast<float*>(scratch.data_ptr());
  if (needs_weight) {
    args.weight_sums = next;
    next += plan.parts * args.n;
  }
  if (needs_bias) {
    args.bias_sums = next;
    next += plan.parts * args.n;
  }
  args.statistics = statistics > 0 ? next : nullptr;
  check_launch(
      kind == LAYER ? layer_backward(args, dtype, wide, plan, device) : rms_backward(args, kind, dtype, wide, plan, device));
  if (results > 0) {
    check_launch(add_parts(
        args.weight_sums, grads.weight.data_ptr(), args.bias_sums, grads.bias.data_ptr(), plan.parts, args.n, dtype, device));
  }
  return grads;
}

// What the args of contiguous operands begin with.
template <typename Args>
Args begin(const Contiguous& of) {
  Args args{};
  const int64_t bytes = of.n * (of.dtype == FLOAT32 ? 4 : 2);
  args.x = RowsAt{static_cast<const char*>(of.x), bytes, 0};
  args.weight = of.weight;
  args.y = of.y;
  args.rows = of.rows;
  args.n = of.n;
  args.inverse = 1.0f / static_cast<float>(of.n);
  args.eps = static_cast<float>(of.eps);
  return args;
}

bool wide_of(const Contiguous& of) {
  const auto bits = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  const uintptr_t row = static_cast<uintptr_t>(of.n) * (of.dtype == FLOAT32 ? 4 : 2);
  return (row | bits(of.x) | bits(of.residual) | bits(of.weight) | bits(of.bias) | bits(of.y) | bits(of.sum)) % 16 == 0;
}

} // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t form) {
  constexpr const char* name = "rms_norm";
  check_input(name, x);
  check_form(name, form);
  return run_rms(name, x, nullptr, weight, eps, form, NO_GATE, PLAIN, nullptr);
}

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, int64_t form) {
  constexpr const char* name = "add_rms_norm";
  check_input(name, x);
  check_form(name, form);
  check_same(name, "residual", residual, x);
  Tensor sum = new_tensor(x);
  Tensor y = run_rms(name, x, &residual, weight, eps, form, NO_GATE, ADD, &sum);
  return {y, sum};
}

Tensor rms_norm_gated(
    const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t form, int64_t kind) {
  constexpr const char* name = "rms_norm_gated";
  check_input(name, x);
  check_same(name, "gate", gate, x);
  check_gate(name, kind);
  STD_TORCH_CHECK(form == CAST_FIRST || (form == CAST_LAST && kind != SILU_FIRST), name, ": there is no such form");
  return run_rms(name, x, &gate, weight, eps, form, kind, GATED, nullptr);
}

void run_rms_norm(const Contiguous& of, int64_t form) {
  RmsArgs args = begin<RmsArgs>(of);
  if (of.residual != nullptr) {
    args.other = RowsAt{static_cast<const char*>(of.residual), args.x.stride, 0};
  }
  args.sum = of.sum;
  args.offset = offset_of(form);
  args.rounds = form == CAST_FIRST;
  check_launch(rms(
      args, of.residual != nullptr ? ADD : PLAIN, static_cast<Dtype>(of.dtype), wide_of(of), OnDevice(of.device)));
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& sum_grad, const Tensor& x, const Tensor& weight, double eps,
    int64_t form, bool needs_weight) {
  constexpr const char* name = "rms_norm_backward";
  check_input(name, x);
  check_form(name, form);
  check_same(name, "gradient", grad, x);
  if (sum_grad) {
    check_same(name, "gradient of the sum", *sum_grad, x);
  }
  const Tensor weights = row_of(name, "weight", weight, x);
  const Tensor x_grad = new_tensor(x);
  BackwardArgs args = begin<BackwardArgs>(x, eps);
  args.x_grad = x_grad.data_ptr();
  args.offset = offset_of(form);
  const RowGrads grads = run_backward(
      name, args, sum_grad ? ADD : PLAIN, grad, x, sum_grad ? &*sum_grad : nullptr, &weights, needs_weight, false);
  return {x_grad, grads.weight};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t kind) {
  constexpr const char* name = "rms_norm_gated_backward";
  check_input(name, x);
  check_same(name, "gradient", grad, x);
  check_same(name, "gate", gate, x);
  check_gate(name, kind);
  const Tensor weights = row_of(name, "weight", weight, x);
  const Tensor x_grad = new_tensor(x), gate_grad = new_tensor(x);
  BackwardArgs args = begin<BackwardArgs>(x, eps);
  args.x_grad = x_grad.data_ptr();
  args.gate_grad = gate_grad.data_ptr();
  args.offset = offset_of(CAST_FIRST);
  args.gate = static_cast<int>(kind);
  const RowGrads grads = run_backward(name, args, GATED, grad, x, &gate, &weights, true, false);
  return {x_grad, gate_grad, grads.weight};
}

Tensor layer_norm(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  constexpr const char* name = "layer_norm";
  check_input(name, x);
  const Dtype dtype = dtype_of(x, name);
  std::optional<Tensor> weights, biases;
  if (weight) {
    weights = row_of(name, "weight", *weight, x);
  }
  if (bias) {
    biases = row_of(name, "bias", *bias, x);
  }
  Tensor y = new_tensor(x);
  LayerArgs args = begin<LayerArgs>(x, eps);
  if (args.rows == 0) {
    return y;
  }
  const OnDevice device(x);
  const RowsOf inputs(x);
  args.x = inputs.at;
  args.x_leading = inputs.leading;
  args.weight = weights ? weights->data_ptr() : nullptr;
  args.bias = biases ? biases->data_ptr() : nullptr;
  args.y = y.data_ptr();
  const bool wide = whole(x, args.n) && inputs.wide && aligned(args.weight) && aligned(args.bias) && aligned(args.y);
  check_launch(layer(args, dtype, wide, device));
  return y;
}

void run_layer_norm(const Contiguous& of) {
  LayerArgs args = begin<LayerArgs>(of);
  args.bias = of.bias;
  check_launch(layer(args, static_cast<Dtype>(of.dtype), wide_of(of), OnDevice(of.device)));
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool needs_weight,
    bool needs_bias) {
  constexpr const char* name = "layer_norm_backward";
  check_input(name, x);
  check_same(name, "gradient", grad, x);
  std::optional<Tensor> weights;
  if (weight) {
    weights = row_of(name, "weight", *weight, x);
  }
  const Tensor x_grad = new_tensor(x);
  BackwardArgs args = begin<BackwardArgs>(x, eps);
  args.x_grad = x_grad.data_ptr();
  args.offset = -0.0f;
  const RowGrads grads =
      run_backward(name, args, LAYER, grad, x, nullptr, weights ? &*weights : nullptr, needs_weight, needs_bias);
  return {x_grad, grads.weight, grads.bias};
}

} // namespace kernelhub
