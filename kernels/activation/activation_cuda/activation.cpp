#include "../activation_cpu/activation.h"

#include "launch.h"
#include "operands.h"

namespace kernelhub {

namespace {

void check_input(const char* name, const Tensor& x, int64_t function) {
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected all tensors on one device; the input is not on a GPU");
  STD_TORCH_CHECK(function >= 0 && function < FUNCTIONS, name, ": function is ", function, "; expected 0 to 3");
}

// As one row of all elements; those that do not fill 16 bytes by themselves.
void run_dense(ElementArgs args, Op op, Dtype dtype, int64_t size, bool wide, const Device& device) {
  const int64_t total = args.rows * args.n, fit = 16 / size, even = wide ? total / fit * fit : 0;
  args.rows = 1;
  if (even > 0) {
    args.n = args.to_stride = even;
    check_launch(elements(args, op, dtype, true, device));
  }
  if (even < total) {
    args.n = args.to_stride = total - even;
    for (RowsAt* rows : {&args.grad, &args.a, &args.b}) {
      rows->data += even * size;
    }
    for (void** to : {&args.y, &args.a_grad, &args.b_grad}) {
      *to = *to == nullptr ? nullptr : static_cast<char*>(*to) + even * size;
    }
    check_launch(elements(args, op, dtype, false, device));
  }
}

// The operands of one op in step, as rows; all as one row where all are contiguous.
class Operands {
 public:
  Operands(const Tensor& first, int64_t function) {
    const int64_t dims = first.dim();
    args.n = dims > 0 ? first.size(dims - 1) : 1;
    args.rows = args.n == 0 ? 0 : first.numel() / args.n;
    args.to_stride = args.n;
    args.function = static_cast<int>(function);
    size_ = static_cast<int64_t>(first.element_size());
  }

  void read(RowsAt& to, Leading& leading, const Tensor& tensor) {
    if (tensor.dim() == 0) {
      to = RowsAt{static_cast<const char*>(tensor.data_ptr()), size_, 0};
      wide_ = wide_ && aligned(to.data);
    } else {
      const RowsOf& rows = kept_[count_++].emplace(tensor);
      to = rows.at;
      leading = rows.leading;
      wide_ = wide_ && rows.wide;
      dense_ = dense_ && to.others == 0 && to.stride == args.n * size_;
    }
  }

  // a and b are the halves of x's rows.
  void read_halves(const Tensor& x) {
    read(args.a, args.a_leading, x);
    args.b = args.a;
    args.b_leading = args.a_leading;
    args.b.data += args.n * size_;
  }

  void write(void*& to, const Tensor& tensor, int64_t behind = 0) {
    to = static_cast<char*>(tensor.data_ptr()) + behind * size_;
    wide_ = wide_ && aligned(to);
  }

  void run(Op op, Dtype dtype, const Device& device) {
    if (args.rows == 0) {
      return;
    }
    if (dense_ && args.to_stride == args.n) {
      run_dense(args, op, dtype, size_, wide_, device);
      return;
    }
    const bool wide = wide_ && args.n * size_ % 16 == 0 && args.to_stride * size_ % 16 == 0;
    check_launch(elements(args, op, dtype, wide, device));
  }

  ElementArgs args{};

 private:
  std::array<std::optional<RowsOf>, 3> kept_;
  size_t count_ = 0;
  int64_t size_;
  bool wide_ = true, dense_ = true;
};

// The halves of x's last dimension: the size of one of them.
int64_t half_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) % 2 == 0, name, ": expected an even last dimension");
  return x.size(x.dim() - 1) / 2;
}

} // namespace

Tensor apply(const Tensor& x, int64_t function) {
  constexpr const char* name = "apply";
  check_input(name, x, function);
  const Dtype dtype = dtype_of(x, name);
  Tensor y = new_tensor(x);
  if (x.numel() == 0) {
    return y;
  }
  const OnDevice device(x);
  Operands of(x, function);
  of.read(of.args.a, of.args.a_leading, x);
  of.write(of.args.y, y);
  of.run(APPLY, dtype, device);
  return y;
}

void run_forward(const Contiguous& of, int64_t function) {
  const int64_t size = of.dtype == FLOAT32 ? 4 : 2;
  ElementArgs args{};
  args.a = RowsAt{static_cast<const char*>(of.a), of.count * size, 0};
  args.b = RowsAt{static_cast<const char*>(of.b), of.count * size, 0};
  args.y = of.y;
  args.rows = 1;
  args.n = args.to_stride = of.count;
  args.function = static_cast<int>(function);
  const bool wide = aligned(of.a) && aligned(of.b) && aligned(of.y);
  run_dense(args, of.b != nullptr ? MULTIPLY : APPLY, static_cast<Dtype>(of.dtype), size, wide, OnDevice(of.device));
}

Tensor apply_backward(const Tensor& grad, const Tensor& x, int64_t function) {
  constexpr const char* name = "apply_backward";
  check_input(name, x, function);
  check_same(name, "gradient", grad, x);
  const Dtype dtype = dtype_of(x, name);
  Tensor x_grad = new_tensor(x);
  if (x.numel() == 0) {
    return x_grad;
  }
  const OnDevice device(x);
  Operands of(x, function);
  of.read(of.args.grad, of.args.grad_leading, grad);
  of.read(of.args.a, of.args.a_leading, x);
  of.write(of.args.a_grad, x_grad);
  of.run(APPLY_BACKWARD, dtype, device);
  return x_grad;
}

Tensor multiply(const Tensor& a, const Tensor& b, int64_t function) {
  constexpr const char* name = "multiply";
  check_input(name, a, function);
  check_same(name, "second operand", b, a);
  const Dtype dtype = dtype_of(a, name);
  Tensor y = new_tensor(a);
  if (a.numel() == 0) {
    return y;
  }
  const OnDevice device(a);
  Operands of(a, function);
  of.read(of.args.a, of.args.a_leading, a);
  of.read(of.args.b, of.args.b_leading, b);
  of.write(of.args.y, y);
  of.run(MULTIPLY, dtype, device);
  return y;
}

namespace {

std::tuple<Tensor, Tensor> gradients(
    const char* name, const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function, const Tensor* y) {
  check_input(name, a, function);
  check_same(name, "second operand", b, a);
  check_same(name, "gradient", grad, a);
  const Dtype dtype = dtype_of(a, name);
  Tensor a_grad = new_tensor(a), b_grad = new_tensor(a);
  if (a.numel() > 0) {
    const OnDevice device(a);
    Operands of(a, function);
    of.read(of.args.grad, of.args.grad_leading, grad);
    of.read(of.args.a, of.args.a_leading, a);
    of.read(of.args.b, of.args.b_leading, b);
    of.write(of.args.a_grad, a_grad);
    of.write(of.args.b_grad, b_grad);
    if (y != nullptr) {
      of.write(of.args.y, *y);
    }
    of.run(MULTIPLY_BACKWARD, dtype, device);
  }
  return {a_grad, b_grad};
}

} // namespace

std::tuple<Tensor, Tensor> multiply_backward(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function) {
  return gradients("multiply_backward", grad, a, b, function, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> multiply_backward_result(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function) {
  constexpr const char* name = "multiply_backward_result";
  check_input(name, a, function);
  const Tensor y = new_tensor(a);
  const auto [a_grad, b_grad] = gradients(name, grad, a, b, function, &y);
  return {a_grad, b_grad, y};
}

Tensor halves(const Tensor& x, int64_t function) {
  constexpr const char* name = "halves";
  check_input(name, x, function);
  const int64_t half = half_of(name, x);
  const Dtype dtype = dtype_of(x, name);
  Tensor y = new_tensor(x, half);
  if (x.numel() == 0) {
    return y;
  }
  const OnDevice device(x);
  Operands of(y, function);
  of.read_halves(x);
  of.write(of.args.y, y);
  of.run(MULTIPLY, dtype, device);
  return y;
}

namespace {

Tensor halves_gradient(const char* name, const Tensor& grad, const Tensor& x, int64_t function, const Tensor* y) {
  check_input(name, x, function);
  const int64_t half = half_of(name, x);
  check_device(name, "gradient", grad, x);
  const auto sizes = grad.sizes(), whole = x.sizes();
  STD_TORCH_CHECK(
      sizes.size() == whole.size() && std::equal(sizes.begin(), sizes.end() - 1, whole.begin()) &&
          sizes[sizes.size() - 1] == half,
      name, ": the gradient is not one of the result");
  const Dtype dtype = dtype_of(x, name);
  Tensor x_grad = new_tensor(x);
  if (x.numel() == 0) {
    return x_grad;
  }
  const OnDevice device(x);
  Operands of(grad, function);
  of.read(of.args.grad, of.args.grad_leading, grad);
  of.read_halves(x);
  of.write(of.args.a_grad, x_grad);
  of.write(of.args.b_grad, x_grad, half);
  of.args.to_stride = 2 * half;
  if (y != nullptr) {
    of.write(of.args.y, *y);
  }
  of.run(MULTIPLY_BACKWARD, dtype, device);
  return x_grad;
}

} // namespace

Tensor halves_backward(const Tensor& grad, const Tensor& x, int64_t function) {
  return halves_gradient("halves_backward", grad, x, function, nullptr);
}

std::tuple<Tensor, Tensor> halves_backward_result(const Tensor& grad, const Tensor& x, int64_t function) {
  constexpr const char* name = "halves_backward_result";
  check_input(name, x, function);
  const Tensor y = new_tensor(x, half_of(name, x));
  return {halves_gradient(name, grad, x, function, &y), y};
}

} // namespace kernelhub
