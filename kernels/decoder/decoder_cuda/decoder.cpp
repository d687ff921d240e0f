#include "decoder.h"

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

void check_weight(const char* name, const char* what, const Tensor& weight, const Tensor& x, int64_t columns) {
  check_device(name, what, weight, x);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == columns && weight.size(1) == x.size(x.dim() - 1), name, ": the ", what,
      " does not fit; expected ", columns, " rows of the input's last dimension");
}

// Columns of the result, of operands that fit.
int64_t check(const char* name, const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function) {
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected all tensors on one device; the input is not on a GPU");
  STD_TORCH_CHECK(function == SILU || function == GELU_TANH, name, ": function is ", function, "; expected 0 or 2");
  STD_TORCH_CHECK(x.dim() > 0 && gate.dim() == 2, name, ": expected an input of rows and weights of two dimensions");
  STD_TORCH_CHECK(dtype_of(x, name) != FLOAT32, name, ": expected bfloat16 or float16");
  const int64_t depth = x.size(x.dim() - 1), columns = gate.size(0);
  STD_TORCH_CHECK(
      depth > 0 && depth % 8 == 0 && columns % 8 == 0, name, ": expected sizes that are multiples of 8, got ", depth,
      " and ", columns);
  check_weight(name, "gate's weight", gate, x, columns);
  check_weight(name, "other weight", up, x, columns);
  STD_TORCH_CHECK(
      x.numel() / depth <= MOST && columns <= MOST && depth <= MOST, name, ": expected sizes of at most ", MOST);
  return columns;
}

void run(
    const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function, const Tensor& y, const Tensor* a,
    const Tensor* b) {
  if (y.numel() == 0) {
    return;
  }
  const OnDevice device(x);
  STD_TORCH_CHECK(device.overlaps, "expected a GPU of compute capability 9.0");
  const Tensor operands[] = {in_order(x), in_order(gate), in_order(up)};
  GatedArgs args{};
  args.x = operands[0].data_ptr();
  args.gate = operands[1].data_ptr();
  args.up = operands[2].data_ptr();
  args.y = y.data_ptr();
  args.a = a == nullptr ? nullptr : a->data_ptr();
  args.b = b == nullptr ? nullptr : b->data_ptr();
  args.columns = gate.size(0);
  args.depth = gate.size(1);
  args.rows = x.numel() / args.depth;
  args.function = static_cast<int>(function);
  check_launch(gated_product(args, dtype_of(x, "gated_product"), device));
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

} // namespace kernelhub
