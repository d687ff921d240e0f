// The decoder's kernels against float64. Arguments: when copies happen (see `Copies`), dtype, rows, depth and the GPU's
// multiprocessors, then
//   add COLUMNS
//   gated COLUMNS FUNCTION KEEP
//   gradients COLUMNS FUNCTION AGAIN
//   mlp COLUMNS FUNCTION KEEP OUT_COLUMNS
//   projections HEADS PERIOD HEAD_DIM   k and v have half of the heads, k has no bias

#include "launch.h"
#include "values.h"

using namespace kernelhub;
using namespace values;

namespace {

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

// The products of a row of x with all rows of a weight.
std::vector<double> products(const Matrix& x, int64_t row, const Matrix& weight) {
  std::vector<double> of(weight.rows());
  for (int64_t column = 0; column < weight.rows(); ++column) {
    of[column] = dot(x.row(row), weight.row(column), x.columns());
  }
  return of;
}

struct Call {
  Dtype dtype;
  const Device& device;
  const Matrix& x;
  double unit; // a rounding's largest part

  // A sum of `depth` products of normal values is about as far from zero as the root of that.
  void see(Worst& worst, double got, double expected, double roundings, double scale = 1.0) const {
    worst.see(got, expected, unit * roundings * (std::abs(expected) + scale));
  }
};

int add(const Call& call, Worst& worst, int64_t columns) {
  const Matrix &x = call.x, weight = normal(columns, x.columns(), call.dtype, 2),
               residual = normal(x.rows(), columns, call.dtype, 3);
  Matrix y(x.rows(), columns, call.dtype);
  const AddArgs args{x.data(), weight.data(), residual.data(), y.data(), x.rows(), columns, x.columns()};
  const int error = add_product(args, call.dtype, call.device);
  const std::vector<double> got = y.read();
  for (int64_t row = 0; row < x.rows(); ++row) {
    const std::vector<double> of = products(x, row, weight);
    for (int64_t column = 0; column < columns; ++column) {
      call.see(worst, got[row * columns + column], of[column] + residual.row(row)[column], 2);
    }
  }
  return error;
}

int gated(const Call& call, Worst& worst, int64_t columns, int function, bool keep) {
  const Matrix &x = call.x, gate = normal(columns, x.columns(), call.dtype, 2), up = normal(columns, x.columns(), call.dtype, 3);
  Matrix y(x.rows(), columns, call.dtype), a(x.rows(), columns, call.dtype), b(x.rows(), columns, call.dtype);
  const GatedArgs args{x.data(), gate.data(), up.data(), y.data(), keep ? a.data() : nullptr, keep ? b.data() : nullptr,
                       x.rows(), columns,     x.columns(), function};
  const int error = gated_product(args, call.dtype, call.device);
  const std::vector<double> got = y.read(), got_a = a.read(), got_b = b.read();
  for (int64_t row = 0; row < x.rows(); ++row) {
    const std::vector<double> of_gate = products(x, row, gate), of_up = products(x, row, up);
    for (int64_t column = 0; column < columns; ++column) {
      const double p = of_gate[column], q = of_up[column];
      const double inside = function == SILU ? p : 1.5957691216057308 * (p + 0.044715 * p * p * p);
      const int64_t at = row * columns + column;
      // p is rounded ahead of the function, whose slope is at most 1.13.
      call.see(worst, got[at], p / (1.0 + std::exp(-inside)) * q, 4, 2.0 * (1.0 + std::abs(p)) * (1.0 + std::abs(q)));
      if (keep) {
        call.see(worst, got_a[at], p, 2);
        call.see(worst, got_b[at], q, 2);
      }
    }
  }
  return error;
}

// Of all pairs of blocks the most steps, where each in turn takes a tile: so many of so many steps, and then so many others.
int most_steps(int pairs, int first, int first_steps, int last, int last_steps) {
  std::vector<int> of(pairs);
  for (int tile = 0; tile < first + last; ++tile) {
    of[tile % pairs] += tile < first ? first_steps : last_steps;
  }
  return *std::max_element(of.begin(), of.end());
}

// By the bits that its parts have, which the two above compare with float64.
int mlp(const Call& call, Worst& worst, int64_t columns, int function, bool keep, int64_t out_columns) {
  const Matrix &x = call.x, gate = normal(columns, x.columns(), call.dtype, 2), up = normal(columns, x.columns(), call.dtype, 3),
               down = normal(out_columns, columns, call.dtype, 4), residual = normal(x.rows(), out_columns, call.dtype, 5);
  std::vector<double> got[2][3];
  int error = 0;
  for (int together = 0; together < 2 && error == 0; ++together) {
    Matrix inner(x.rows(), columns, call.dtype), a(x.rows(), columns, call.dtype), b(x.rows(), columns, call.dtype),
        y(x.rows(), out_columns, call.dtype);
    std::vector<int, model::Shared<int>> written((x.rows() + 255) / 256 * 2, -1);
    const GatedArgs first{x.data(), gate.data(), up.data(), inner.data(), keep ? a.data() : nullptr, keep ? b.data() : nullptr,
                          x.rows(), columns,     x.columns(), function};
    const AddArgs last{inner.data(), down.data(), residual.data(), y.data(), x.rows(), out_columns, columns};
    if (together) {
      error = added_mlp(first, last, written.data(), call.dtype, call.device);
      const auto up = [](int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); };
      const int down = up(x.rows(), 256), pairs = call.device.multiprocessors / 2;
      const int expected =
          most_steps(pairs, down * up(2 * columns, 256), up(x.columns(), 64), down * up(out_columns, 256), up(columns, 64));
      if (pairs * 2 <= static_cast<int>(model::MOST_TOGETHER) && model::most_steps() != expected) {
        model::fail("%d steps of a pair of blocks; expected at most %d", model::most_steps(), expected);
      }
    } else {
      error = gated_product(first, call.dtype, call.device);
      error = error == 0 ? add_product(last, call.dtype, call.device) : error;
    }
    got[together][0] = y.read();
    got[together][1] = a.read();
    got[together][2] = b.read();
  }
  for (int of = 0; error == 0 && of < (keep ? 3 : 1); ++of) {
    for (size_t i = 0; i < got[0][of].size(); ++i) {
      worst.see(got[1][of][i] == got[0][of][i] ? 0.0 : 2.0, 0.0, 1.0);
    }
  }
  return error;
}

int gradients(const Call& call, Worst& worst, int64_t columns, int function, bool again) {
  std::mt19937 random(3);
  std::normal_distribution<float> of;
  // One of which no power of e is a float; gelu's third power is one.
  const float extreme = call.dtype == FLOAT16 ? -6e4f : function == SILU ? -3e38f : -1e16f;
  const Matrix &grad = call.x, weight = normal(grad.columns(), columns, call.dtype, 2),
               a(grad.rows(), columns, call.dtype, [&](int64_t i) { return i == 0 ? extreme : of(random); }),
               b = normal(grad.rows(), columns, call.dtype, 4);
  Matrix a_grad(grad.rows(), columns, call.dtype), b_grad(grad.rows(), columns, call.dtype), y(grad.rows(), columns, call.dtype);
  const GradientsArgs args{grad.data(), weight.data(), a.data(), b.data(), a_grad.data(), b_grad.data(), again ? y.data() : nullptr,
                           grad.rows(), columns, grad.columns(), function};
  const int error = gated_gradients(args, call.dtype, call.device);
  const std::vector<double> got_a = a_grad.read(), got_b = b_grad.read(), got_y = y.read();
  for (int64_t row = 0; row < grad.rows(); ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double g = 0.0;
      for (int64_t step = 0; step < grad.columns(); ++step) {
        g += grad.row(row)[step] * weight.row(step)[column];
      }
      const double p = a.row(row)[column], q = b.row(row)[column], by = 1.5957691216057308;
      const double inside = function == SILU ? p : by * (p + 0.044715 * p * p * p);
      const double inside_slope = function == SILU ? 1.0 : by * (1.0 + 3 * 0.044715 * p * p);
      const double part = 1.0 / (1.0 + std::exp(-inside)), slope = part + p * part * (1.0 - part) * inside_slope;
      const int64_t at = row * columns + column;
      call.see(worst, got_a[at], g * q * slope, 3, 1.0 + std::abs(q));
      call.see(worst, got_b[at], g * p * part, 3, 1.0 + std::min(std::abs(p), 8.0));
      if (again) {
        call.see(worst, got_y[at], p * part * q, 3);
      } else {
        worst.see(std::isnan(got_y[at]) ? 0.0 : 2.0, 0.0, 1.0); // not written
      }
    }
  }
  return error;
}

int projections(const Call& call, Worst& worst, int64_t heads, int64_t period, int head_dim) {
  const Matrix &x = call.x, cos = normal(period, head_dim, call.dtype, 10), sin = normal(period, head_dim, call.dtype, 11);
  std::vector<Matrix> weights, biases, results;
  ProjectionsArgs args{};
  for (int of = 0; of < 3; ++of) {
    const int64_t columns = (of == 0 ? heads : std::max<int64_t>(heads / 2, 1)) * head_dim;
    weights.push_back(normal(columns, x.columns(), call.dtype, 2 + of));
    biases.push_back(normal(1, columns, call.dtype, 5 + of));
    results.emplace_back(x.rows(), columns, call.dtype);
  }
  for (int of = 0; of < 3; ++of) {
    args.weights[of] = weights[of].data();
    args.biases[of] = of == 1 ? nullptr : biases[of].data();
    args.results[of] = results[of].data();
    args.columns[of] = weights[of].rows();
  }
  args.x = x.data(), args.cos = cos.data(), args.sin = sin.data();
  args.rows = x.rows(), args.depth = x.columns(), args.period = period, args.head_dim = head_dim;
  const int error = rotary_projections(args, call.dtype, call.device);
  for (int of = 0; of < 3; ++of) {
    const std::vector<double> got = results[of].read();
    const int64_t columns = weights[of].rows(), half = head_dim / 2;
    for (int64_t row = 0; row < x.rows(); ++row) {
      std::vector<double> v = products(x, row, weights[of]);
      for (int64_t column = 0; column < columns; ++column) {
        v[column] += of == 1 ? 0.0 : biases[of].wide[column];
      }
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t within = column % head_dim;
        double expected = v[column], scale = 1.0;
        if (of < 2) {
          const double other = within < half ? -v[column + half] : v[column - half];
          const double a = expected * cos.row(row % period)[within], b = other * sin.row(row % period)[within];
          expected = a + b;
          scale += std::abs(a) + std::abs(b);
        }
        call.see(worst, got[row * columns + column], expected, 3, scale);
      }
    }
  }
  return error;
}

} // namespace

int main(int count, char** arguments) {
  if (count < 8) {
    model::fail("arguments are missing");
  }
  values::set_copies(arguments[1]);
  model::cluster = 2;
  const Dtype dtype = std::string(arguments[2]) == "bfloat16" ? BFLOAT16 : FLOAT16;
  const Matrix x = normal(number(arguments[3]), number(arguments[4]), dtype, 1);
  const Device device{0, static_cast<int>(number(arguments[5])), 2048, 232448, 0, 90, nullptr};
  const Call call{dtype, device, x, dtype == BFLOAT16 ? 0x1p-8 : 0x1p-11};
  const std::string op = arguments[6];
  const auto argument = [&](int i) { return i < count ? number(arguments[i]) : 0; };
  Worst worst;
  const int error = op == "add" ? add(call, worst, argument(7))
      : op == "gated"           ? gated(call, worst, argument(7), static_cast<int>(argument(8)), argument(9) != 0)
      : op == "mlp"             ? mlp(call, worst, argument(7), static_cast<int>(argument(8)), argument(9) != 0, argument(10))
      : op == "gradients"       ? gradients(call, worst, argument(7), static_cast<int>(argument(8)), argument(9) != 0)
                                : projections(call, worst, argument(7), argument(8), static_cast<int>(argument(9)));
  if (error != 0) {
    model::fail("the launch returned error %d", error);
  }
  if (model::last_error != cudaSuccess) {
    model::fail("error %d is left for whoever asks next", model::last_error);
  }
  return worst.report(op.c_str());
}
