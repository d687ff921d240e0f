#include "activation.h"

#include "elements.h"
#include "operands.h"

namespace kernelhub {

namespace {

const Table& table_in_use() {
  return table_of(static_cast<Level>(level_in_use().load(std::memory_order_relaxed)));
}

// Elements that are worked on at a time where rows play no part: of three operands they fit into the innermost cache.
constexpr int64_t CHUNK = 2048;

using Run = void (*)(const Elements&);

Run pick(const Run (&of)[DTYPES][FUNCTIONS], const char* name, const Tensor& x, int64_t function) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected all tensors on one device; the input is not on the CPU");
  STD_TORCH_CHECK(function >= 0 && function < FUNCTIONS, name, ": function is ", function, "; expected 0 to 3");
  return of[dtype_of(x, name)][function];
}

void* at(const Tensor& dense, int64_t element) {
  return static_cast<char*>(dense.data_ptr()) + element * static_cast<int64_t>(dense.element_size());
}

// `each(begin, count)` for parts of n elements that all operands have side by side.
template <typename Each>
void for_chunks(int64_t n, const Each& each) {
  for_rows((n + CHUNK - 1) / CHUNK, CHUNK, [&](int64_t chunk) {
    each(chunk * CHUNK, std::min(CHUNK, n - chunk * CHUNK));
  });
}

// The operands of one op in step: by chunks where all are contiguous, else row by row. `work` gets the elements with the
// pointers to the inputs set, and the number of the first.
template <size_t COUNT, typename Work>
void together(const std::array<const Tensor*, COUNT>& inputs, const Work& work) {
  const Tensor& first = *inputs[0];
  bool dense = true;
  for (const Tensor* input : inputs) {
    dense = dense && input->is_contiguous();
  }
  if (dense) {
    for_chunks(first.numel(), [&](int64_t begin, int64_t count) {
      std::array<const void*, COUNT> from;
      for (size_t k = 0; k < COUNT; ++k) {
        from[k] = at(*inputs[k], begin);
      }
      work(from, begin, count);
    });
    return;
  }
  std::array<RowsOf, COUNT> rows = [&]() {
    if constexpr (COUNT == 1) {
      return std::array<RowsOf, 1>{RowsOf(*inputs[0])};
    } else if constexpr (COUNT == 2) {
      return std::array<RowsOf, 2>{RowsOf(*inputs[0]), RowsOf(*inputs[1])};
    } else {
      return std::array<RowsOf, 3>{RowsOf(*inputs[0]), RowsOf(*inputs[1]), RowsOf(*inputs[2])};
    }
  }();
  const int64_t n = first.size(first.dim() - 1);
  for_rows(n == 0 ? 0 : first.numel() / n, n, [&](int64_t row) {
    std::array<const void*, COUNT> from;
    for (size_t k = 0; k < COUNT; ++k) {
      from[k] = rows[k][row];
    }
    work(from, row * n, n);
  });
}

// The halves of x's last dimension: the sizes of one of them.
int64_t half_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) % 2 == 0, name, ": expected an even last dimension");
  return x.size(x.dim() - 1) / 2;
}

} // namespace

int64_t use_level(int64_t level) {
  level_in_use() = static_cast<int>(std::clamp<int64_t>(level, PLAIN, detect_level()));
  return level_in_use();
}

Tensor apply(const Tensor& x, int64_t function) {
  const Run run = pick(table_in_use().apply, "apply", x, function);
  const Tensor y = new_tensor(x, x.scalar_type());
  together<1>({&x}, [&](const auto& from, int64_t begin, int64_t count) {
    Elements of{};
    of.a = from[0];
    of.y = at(y, begin);
    of.n = count;
    run(of);
  });
  return y;
}

void run_forward(const Contiguous& of, int64_t function) {
  const Table& table = table_in_use();
  const Run run = (of.b != nullptr ? table.multiply : table.apply)[of.dtype][function];
  const int64_t bytes = of.dtype == FLOAT32 ? 4 : 2;
  for_chunks(of.count, [&](int64_t begin, int64_t count) {
    Elements some{};
    some.a = static_cast<const char*>(of.a) + begin * bytes;
    some.b = of.b != nullptr ? static_cast<const char*>(of.b) + begin * bytes : nullptr;
    some.y = static_cast<char*>(of.y) + begin * bytes;
    some.n = count;
    run(some);
  });
}

Tensor apply_backward(const Tensor& grad, const Tensor& x, int64_t function) {
  const Run run = pick(table_in_use().apply_backward, "apply_backward", x, function);
  check_same("apply_backward", "gradient", grad, x);
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  together<2>({&grad, &x}, [&](const auto& from, int64_t begin, int64_t count) {
    Elements of{};
    of.grad = from[0];
    of.a = from[1];
    of.a_grad = at(x_grad, begin);
    of.n = count;
    run(of);
  });
  return x_grad;
}

Tensor multiply(const Tensor& a, const Tensor& b, int64_t function) {
  const Run run = pick(table_in_use().multiply, "multiply", a, function);
  check_same("multiply", "second operand", b, a);
  const Tensor y = new_tensor(a, a.scalar_type());
  together<2>({&a, &b}, [&](const auto& from, int64_t begin, int64_t count) {
    Elements of{};
    of.a = from[0];
    of.b = from[1];
    of.y = at(y, begin);
    of.n = count;
    run(of);
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor> gradients(
    const char* name, const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function, const Tensor* y) {
  const Run run = pick(table_in_use().multiply_backward, name, a, function);
  check_same(name, "second operand", b, a);
  check_same(name, "gradient", grad, a);
  const Tensor a_grad = new_tensor(a, a.scalar_type()), b_grad = new_tensor(a, a.scalar_type());
  together<3>({&grad, &a, &b}, [&](const auto& from, int64_t begin, int64_t count) {
    Elements of{};
    of.grad = from[0];
    of.a = from[1];
    of.b = from[2];
    of.a_grad = at(a_grad, begin);
    of.b_grad = at(b_grad, begin);
    of.y = y == nullptr ? nullptr : at(*y, begin);
    of.n = count;
    run(of);
  });
  return {a_grad, b_grad};
}

} // namespace

std::tuple<Tensor, Tensor> multiply_backward(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function) {
  return gradients("multiply_backward", grad, a, b, function, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> multiply_backward_result(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function) {
  const Tensor y = new_tensor(a, a.scalar_type());
  const auto [a_grad, b_grad] = gradients("multiply_backward_result", grad, a, b, function, &y);
  return {a_grad, b_grad, y};
}

Tensor halves(const Tensor& x, int64_t function) {
  const Run run = pick(table_in_use().multiply, "halves", x, function);
  const int64_t half = half_of("halves", x), rows = half == 0 ? 0 : x.numel() / half / 2;
  const Tensor y = new_tensor(x, x.scalar_type(), half);
  const RowsOf inputs(x);
  const int64_t bytes = half * static_cast<int64_t>(x.element_size());
  for_rows(rows, half, [&](int64_t row) {
    Elements of{};
    of.a = inputs[row];
    of.b = static_cast<const char*>(of.a) + bytes;
    of.y = at(y, row * half);
    of.n = half;
    run(of);
  });
  return y;
}

namespace {

Tensor halves_gradient(const char* name, const Tensor& grad, const Tensor& x, int64_t function, const Tensor* y) {
  const Run run = pick(table_in_use().multiply_backward, name, x, function);
  const int64_t half = half_of(name, x), rows = half == 0 ? 0 : x.numel() / half / 2;
  const auto sizes = grad.sizes(), whole = x.sizes();
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.scalar_type() == x.scalar_type() && sizes.size() == whole.size() &&
          std::equal(sizes.begin(), sizes.end() - 1, whole.begin()) && sizes[sizes.size() - 1] == half,
      name, ": the gradient is not one of the result");
  const Tensor x_grad = new_tensor(x, x.scalar_type());
  const RowsOf inputs(x), grads(grad);
  const int64_t bytes = half * static_cast<int64_t>(x.element_size());
  for_rows(rows, half, [&](int64_t row) {
    Elements of{};
    of.grad = grads[row];
    of.a = inputs[row];
    of.b = static_cast<const char*>(of.a) + bytes;
    of.a_grad = at(x_grad, row * 2 * half);
    of.b_grad = static_cast<char*>(of.a_grad) + bytes;
    of.y = y == nullptr ? nullptr : at(*y, row * half);
    of.n = half;
    run(of);
  });
  return x_grad;
}

} // namespace

Tensor halves_backward(const Tensor& grad, const Tensor& x, int64_t function) {
  return halves_gradient("halves_backward", grad, x, function, nullptr);
}

std::tuple<Tensor, Tensor> halves_backward_result(const Tensor& grad, const Tensor& x, int64_t function) {
  constexpr const char* name = "halves_backward_result";
  const Tensor y = new_tensor(x, x.scalar_type(), half_of(name, x));
  return {halves_gradient(name, grad, x, function, &y), y};
}

} // namespace kernelhub
