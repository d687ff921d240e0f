#include "decoder.h"

#include <algorithm>
#include <limits>

#include "launch.h"
#include "operands.h"

namespace kernelhub {

namespace {

// Of rows, columns and depth: what the kernel rounds up to whole tiles is an int.
constexpr int64_t MOST = std::numeric_limits<int32_t>::max() - 255;

// The tensor as the GPU's copy engine takes it: contiguous, and aligned to 16 bytes.
Tensor in_order(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return aligned(dense.data_ptr()) ? dense : torch::stable::clone(dense);
}

// The input: rows of `depth` elements, which is its last dimension.
int64_t check_input(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected all tensors on one device; the input is not on a GPU");
  STD_TORCH_CHECK(x.dim() > 0, name, ": expected an input of rows");
  STD_TORCH_CHECK(dtype_of(x, name) != FLOAT32, name, ": expected bfloat16 or float16");
  const int64_t depth = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      depth > 0 && depth % 8 == 0 && depth <= MOST && x.numel() / depth <= MOST, name,
      ": expected rows of a multiple of 8 elements, and of both at most ", MOST, "; got ", depth, " elements");
  return depth;
}

// A weight's rows, which are a result's columns.
int64_t check_weight(const char* name, const char* what, const Tensor& weight, const Tensor& x, int64_t multiple) {
  check_device(name, what, weight, x);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), name, ": the ", what,
      " does not fit; expected rows of the input's last dimension");
  const int64_t columns = weight.size(0);
  STD_TORCH_CHECK(
      columns > 0 && columns % multiple == 0 && columns <= MOST, name, ": the ", what, " has ", columns,
      " rows; expected a multiple of ", multiple, ", at most ", MOST);
  return columns;
}

void check_function(const char* name, int64_t function) {
  STD_TORCH_CHECK(function == SILU || function == GELU_TANH, name, ": function is ", function, "; expected 0 or 2");
}

// A tensor of the input's leading dimensions and as many columns.
void check_beside(const char* name, const char* what, const Tensor& of, const Tensor& x, int64_t columns) {
  check_device(name, what, of, x);
  const auto sizes = x.sizes(), others = of.sizes();
  STD_TORCH_CHECK(
      sizes.size() == others.size() && std::equal(sizes.begin(), sizes.end() - 1, others.begin()) &&
          others[others.size() - 1] == columns,
      name, ": the ", what, " has another shape than the product");
}

// Columns of the result, of operands that fit.
int64_t check(const char* name, const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function) {
  check_input(name, x);
  check_function(name, function);
  const int64_t columns = check_weight(name, "gate's weight", gate, x, 8);
  STD_TORCH_CHECK(
      check_weight(name, "other weight", up, x, 8) == columns, name, ": expected as many rows of both weights, ", columns);
  return columns;
}

void check_capability(const Device& device) {
  STD_TORCH_CHECK(device.capability == 90, "expected a GPU of compute capability 9.0");
}

// Of operands that fit; what `args` points to is kept here as long as it is asked for.
class Gated {
 public:
  Gated(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function, const Tensor& y, const Tensor* a, const Tensor* b)
      : operands_{in_order(x), in_order(gate), in_order(up)} {
    args.x = operands_[0].data_ptr();
    args.gate = operands_[1].data_ptr();
    args.up = operands_[2].data_ptr();
    args.y = y.data_ptr();
    args.a = a == nullptr ? nullptr : a->data_ptr();
    args.b = b == nullptr ? nullptr : b->data_ptr();
    args.columns = gate.size(0);
    args.depth = gate.size(1);
    args.rows = x.numel() / args.depth;
    args.function = static_cast<int>(function);
  }

  GatedArgs args{};

 private:
  Tensor operands_[3];
};

void run(
    const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function, const Tensor& y, const Tensor* a,
    const Tensor* b) {
  if (y.numel() == 0) {
    return;
  }
  const OnDevice device(x);
  check_capability(device);
  const Gated gated(x, gate, up, function, y, a, b);
  check_launch(gated_product(gated.args, dtype_of(x, "gated_product"), device));
}

// y = residual + (f(x @ gate.T) * (x @ up.T)) @ down.T
Tensor run_added(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& residual, int64_t function,
    const Tensor* a, const Tensor* b) {
  const char* const name = "added_mlp";
  const Tensor inner = new_tensor(x, gate.size(0));
  AddArgs added{};
  added.depth = gate.size(0);
  added.columns = check_weight(name, "last weight", down, inner, 8);
  check_beside(name, "residual", residual, x, added.columns);
  const Tensor y = new_tensor(x, added.columns);
  if (y.numel() == 0) {
    return y;
  }
  const OnDevice device(x);
  check_capability(device);
  const Gated gated(x, gate, up, function, inner, a, b);
  const Tensor dense[] = {in_order(down), in_order(residual)};
  added.x = inner.data_ptr();
  added.weight = dense[0].data_ptr();
  added.residual = dense[1].data_ptr();
  added.y = y.data_ptr();
  added.rows = gated.args.rows;
  const Tensor written = new_row((added.rows + 255) / 256 * 2, ScalarType::Int, x);
  check_launch(added_mlp(gated.args, added, static_cast<int*>(written.data_ptr()), dtype_of(x, name), device));
  return y;
}

} // namespace

Tensor gated_product(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function) {
  const Tensor y = new_tensor(x, check("gated_product", x, gate, up, function));
  run(x, gate, up, function, y, nullptr, nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_product_parts(
    const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function) {
  const int64_t columns = check("gated_product_parts", x, gate, up, function);
  const Tensor y = new_tensor(x, columns), a = new_tensor(x, columns), b = new_tensor(x, columns);
  run(x, gate, up, function, y, &a, &b);
  return {y, a, b};
}

Tensor added_mlp(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& residual, int64_t function) {
  check("added_mlp", x, gate, up, function);
  return run_added(x, gate, up, down, residual, function, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> added_mlp_parts(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& residual, int64_t function) {
  const int64_t columns = check("added_mlp_parts", x, gate, up, function);
  const Tensor a = new_tensor(x, columns), b = new_tensor(x, columns);
  return {run_added(x, gate, up, down, residual, function, &a, &b), a, b};
}

std::tuple<Tensor, Tensor, Tensor> rotary_projections(
    const Tensor& x, const Tensor& q, const std::optional<Tensor>& q_bias, const Tensor& k,
    const std::optional<Tensor>& k_bias, const Tensor& v, const std::optional<Tensor>& v_bias, const Tensor& cos,
    const Tensor& sin, int64_t head_dim) {
  const char* const name = "rotary_projections";
  const char* const names[] = {"query's weight", "key's weight", "value's weight"};
  const char* const bias_names[] = {"query's bias", "key's bias", "value's bias"};
  const Tensor* const weights[] = {&q, &k, &v};
  const std::optional<Tensor>* const biases[] = {&q_bias, &k_bias, &v_bias};
  ProjectionsArgs args{};
  args.depth = check_input(name, x);
  args.rows = x.numel() / args.depth;
  STD_TORCH_CHECK(
      head_dim == 64 || head_dim == 128 || head_dim == 256, name, ": head_dim is ", head_dim, "; expected 64, 128 or 256");
  args.head_dim = static_cast<int>(head_dim);
  for (int of = 0; of < 3; ++of) {
    args.columns[of] = check_weight(name, names[of], *weights[of], x, head_dim);
    if (biases[of]->has_value()) {
      const Tensor& bias = biases[of]->value();
      check_device(name, bias_names[of], bias, x);
      STD_TORCH_CHECK(
          bias.dim() == 1 && bias.size(0) == args.columns[of], name, ": the ", bias_names[of], " does not fit; expected ",
          args.columns[of], " elements");
    }
  }
  STD_TORCH_CHECK(
      args.columns[0] + args.columns[1] + args.columns[2] <= MOST, name, ": expected at most ", MOST, " rows of all weights");
  check_device(name, "cosine", cos, x);
  check_same(name, "sine", sin, cos);
  STD_TORCH_CHECK(
      cos.dim() == 3 && cos.size(2) == head_dim, name, ": expected tables of (batch or 1, tokens, ", head_dim, ")");
  args.period = cos.size(0) * cos.size(1);
  STD_TORCH_CHECK(
      args.period == args.rows || (cos.size(0) == 1 && args.period > 0 && args.rows % args.period == 0), name,
      ": the tables have ", cos.size(0), " times ", cos.size(1), " rows; expected one for each of the input's ", args.rows,
      ", or for each token");
  const Tensor results[] = {new_tensor(x, args.columns[0]), new_tensor(x, args.columns[1]), new_tensor(x, args.columns[2])};
  if (args.rows > 0) {
    const OnDevice device(x);
    check_capability(device);
    const Tensor dense[] = {in_order(x), in_order(q), in_order(k), in_order(v), in_order(cos), in_order(sin)};
    std::optional<Tensor> dense_biases[3];
    args.x = dense[0].data_ptr();
    for (int of = 0; of < 3; ++of) {
      args.weights[of] = dense[1 + of].data_ptr();
      args.results[of] = results[of].data_ptr();
      if (biases[of]->has_value()) {
        dense_biases[of] = in_order(biases[of]->value());
        args.biases[of] = dense_biases[of]->data_ptr();
      }
    }
    args.cos = dense[4].data_ptr();
    args.sin = dense[5].data_ptr();
    check_launch(rotary_projections(args, dtype_of(x, name), device));
  }
  return {results[0], results[1], results[2]};
}

Tensor add_product(const Tensor& x, const Tensor& weight, const Tensor& residual) {
  const char* const name = "add_product";
  AddArgs args{};
  args.depth = check_input(name, x);
  args.rows = x.numel() / args.depth;
  args.columns = check_weight(name, "weight", weight, x, 8);
  check_beside(name, "residual", residual, x, args.columns);
  const Tensor y = new_tensor(x, args.columns);
  if (args.rows > 0) {
    const OnDevice device(x);
    check_capability(device);
    const Tensor dense[] = {in_order(x), in_order(weight), in_order(residual)};
    args.x = dense[0].data_ptr();
    args.weight = dense[1].data_ptr();
    args.residual = dense[2].data_ptr();
    args.y = y.data_ptr();
    check_launch(add_product(args, dtype_of(x, name), device));
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_gradients(
    const Tensor& grad, const Tensor& weight, const Tensor& gate, const Tensor& up, int64_t function, bool result) {
  const char* const name = "gated_gradients";
  GradientsArgs args{};
  args.depth = check_input(name, grad);
  args.rows = grad.numel() / args.depth;
  check_function(name, function);
  args.function = static_cast<int>(function);
  check_device(name, "weight", weight, grad);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == args.depth, name,
      ": the weight does not fit; expected as many rows as the gradient's last dimension");
  args.columns = weight.size(1);
  STD_TORCH_CHECK(
      args.columns > 0 && args.columns % 8 == 0 && args.columns <= MOST, name, ": the weight has ", args.columns,
      " columns; expected a multiple of 8, at most ", MOST);
  check_beside(name, "gate", gate, grad, args.columns);
  check_beside(name, "other factor", up, grad, args.columns);
  const Tensor gate_grad = new_tensor(grad, args.columns), up_grad = new_tensor(grad, args.columns);
  const Tensor y = result ? new_tensor(grad, args.columns) : new_row(0, grad.scalar_type(), grad);
  if (args.rows > 0) {
    const OnDevice device(grad);
    check_capability(device);
    const Tensor dense[] = {in_order(grad), in_order(weight), in_order(gate), in_order(up)};
    args.grad = dense[0].data_ptr();
    args.weight = dense[1].data_ptr();
    args.a = dense[2].data_ptr();
    args.b = dense[3].data_ptr();
    args.a_grad = gate_grad.data_ptr();
    args.b_grad = up_grad.data_ptr();
    args.y = result ? y.data_ptr() : nullptr;
    check_launch(gated_gradients(args, dtype_of(grad, name), device));
  }
  return {gate_grad, up_grad, y};
}

} // namespace kernelhub
