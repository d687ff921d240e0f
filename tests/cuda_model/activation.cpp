// The activations' kernels against float64. Arguments: dtype, rows, elements of a row, the GPU's multiprocessors, where the rows
// lie, the op (apply or multiply, or the backward of one, as `multiply_backward`, or `multiply_backward_result`, which writes
// f(a) * b too), and the function.
// Rows lie
//   dense    one behind the other; as one row, as the op has them then
//   halves   each a's, then b's, of a row of twice as many elements; and so do gradients
//   apart    each one element behind the one before: rows that are not aligned
//   turned   as the columns of a matrix of rows of 3: two dimensions, the inner one further apart

#include "launch.h"
#include "values.h"

using namespace kernelhub;
using namespace values;

namespace {

double value(int function, double x) {
  switch (function) {
    case SILU:
      return x / (1.0 + std::exp(-x));
    case GELU:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case GELU_TANH:
      return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    default:
      return x / (1.0 + std::exp(-1.702 * x));
  }
}

double slope(int function, double x) {
  constexpr double STEP = 1e-5;
  return (value(function, x + STEP) - value(function, x - STEP)) / (2.0 * STEP);
}

// Where each row begins, in elements.
struct Rows {
  int64_t rows, n;
  std::string lie;

  int64_t stride() const { return lie == "halves" ? 2 * n : lie == "apart" ? n + 1 : n; }
  int64_t begin(int64_t row) const { return lie == "turned" ? (row % 3 * (rows / 3) + row / 3) * n : row * stride(); }

  RowsAt at(const char* data, int64_t size, Leading& leading) const {
    if (lie != "turned") {
      return {data, stride() * size, 0};
    }
    leading.sizes[0] = 3, leading.strides[0] = rows / 3 * n * size;
    return {data, n * size, 1};
  }
};

} // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    model::fail("arguments are missing");
  }
  const std::string type = arguments[1], op = arguments[6];
  const Dtype dtype = type == "bfloat16" ? BFLOAT16 : FLOAT32;
  const int64_t size = dtype == FLOAT32 ? 4 : 2;
  const Rows rows{number(arguments[2]), number(arguments[3]), arguments[5]};
  const Device device{0, static_cast<int>(number(arguments[4])), 2048, 232448, 0, 90, nullptr};
  const int function = static_cast<int>(number(arguments[7]));
  const bool backward = op.find("_backward") != std::string::npos, multiplies = op.find("multiply") == 0;
  const bool results = op == "multiply_backward_result", halves = rows.lie == "halves", dense = rows.lie == "dense";

  const Matrix first = normal(rows.rows, rows.stride(), dtype, 1), second = normal(rows.rows, rows.stride(), dtype, 2);
  const Matrix grad = normal(rows.rows, rows.n, dtype, 3);
  const int64_t to_stride = halves && backward ? 2 * rows.n : rows.n;
  // Of a row more, which nothing may write
  Matrix y(rows.rows + 1, rows.n, dtype), a_grad(rows.rows + 1, to_stride, dtype), b_grad(rows.rows + 1, to_stride, dtype);
  const char* const b_data = halves ? first.data() + rows.n * size : second.data();

  ElementArgs args{};
  args.a = rows.at(first.data(), size, args.a_leading);
  if (multiplies) {
    args.b = rows.at(b_data, size, args.b_leading);
  }
  if (backward) {
    args.grad = {grad.data(), rows.n * size, 0};
    args.a_grad = a_grad.data();
    args.b_grad = multiplies ? b_grad.data() : nullptr;
  }
  args.y = !backward || results ? y.data() : nullptr;
  args.rows = dense ? 1 : rows.rows;
  args.n = dense ? rows.rows * rows.n : rows.n;
  args.to_stride = dense ? args.n : to_stride;
  args.function = function;
  const Op of = !multiplies ? (backward ? APPLY_BACKWARD : APPLY) : backward ? MULTIPLY_BACKWARD : MULTIPLY;
  const bool wide = rows.n * size % 16 == 0 && rows.stride() * size % 16 == 0;
  if (const int error = elements(args, of, dtype, wide, device); error != 0) {
    model::fail("the launch returned error %d", error);
  }

  const double unit = dtype == BFLOAT16 ? 0x1p-8 : 0x1p-20;
  const std::vector<double> got = y.read(), got_a = a_grad.read(), got_b = b_grad.read();
  Worst worst;
  const auto see = [&](double is, double expected) { worst.see(is, expected, unit * 4 * (std::abs(expected) + 0.1)); };
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int64_t i = 0; i < rows.n; ++i) {
      const int64_t at = rows.begin(row) + i, dense_at = row * rows.n + i, to = row * to_stride + i;
      const double a = first.wide[at], b = halves ? first.wide[at + rows.n] : second.wide[at], g = grad.wide[dense_at];
      if (!backward || results) {
        see(got[dense_at], value(function, a) * (multiplies ? b : 1.0));
      }
      if (backward) {
        see(got_a[to], g * slope(function, a) * (multiplies ? b : 1.0));
        if (multiplies) {
          see(got_b[to], g * value(function, a));
        }
      }
    }
  }
  for (const std::vector<double>* all : {&got, &got_a, &got_b}) {
    const int64_t stride = all == &got ? rows.n : to_stride;
    for (int64_t i = rows.rows * stride; i < static_cast<int64_t>(all->size()); ++i) {
      if (!std::isnan((*all)[i])) {
        model::fail("something is written behind the last row");
      }
    }
  }
  return worst.report(op.c_str());
}
