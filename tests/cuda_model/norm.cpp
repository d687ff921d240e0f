// The norms' kernels against float64. Arguments: when copies happen (see `Copies`), dtype, rows, elements of a row, the GPU's
// multiprocessors, what the rows are, and the op: layer, rms, add or gated, the backward of one of them, as `layer_backward`,
// or parts, which adds up two times as many rows.
// Rows are
//   normal   of normal values
//   far      the same, far from zero
//   equal    of equal elements, far from zero
//   huge     far from zero, their squares too large for float32
//   apart    normal, each one element behind the one before: rows that are not aligned
//   cached   normal, and the second cache holds all of them

#include "launch.h"
#include "values.h"

using namespace kernelhub;
using namespace values;

namespace {

constexpr float EPS = 1e-5f;

struct Call {
  Dtype dtype;
  const Device& device;
  Kind kind;
  const Matrix &x, &other, &weight, &bias;
  bool wide;
  double unit; // a rounding's largest part

  int64_t rows() const { return x.rows(); }
  int64_t n() const { return weight.columns(); }
  RowsAt at(const Matrix& matrix) const { return {matrix.data(), matrix.columns() * (dtype == FLOAT32 ? 4 : 2), 0}; }
};

double silu(double z) { return z / (1.0 + std::exp(-z)); }
double silu_slope(double z) {
  const double e = 1.0 / (1.0 + std::exp(-z));
  return e * (1.0 + z * (1.0 - e));
}

// A row, and what its norm takes off and divides by.
struct Row {
  std::vector<double> x;
  double mean = 0.0, scale;

  Row(const Call& call, const double* from) : x(from, from + call.n()) {
    const double n = static_cast<double>(call.n());
    if (call.kind == LAYER) {
      for (const double value : x) {
        mean += value / n;
      }
    }
    double square = 0.0;
    for (const double value : x) {
      square += (value - mean) * (value - mean) / n;
    }
    scale = 1.0 / std::sqrt(square + EPS);
  }
};

int forward(const Call& call, Worst& worst) {
  const int64_t n = call.n();
  Matrix y(call.rows(), n, call.dtype), sum(call.rows(), n, call.dtype);
  int error;
  if (call.kind == LAYER) {
    const LayerArgs args{call.at(call.x), call.weight.data(), call.bias.data(), y.data(), call.rows(), n, 1.0f / n, EPS, {}};
    error = layer(args, call.dtype, call.wide, call.device);
  } else {
    RmsArgs args{};
    args.x = call.at(call.x), args.weight = call.weight.data(), args.y = y.data(), args.rows = call.rows(), args.n = n;
    args.inverse = 1.0f / n, args.eps = EPS, args.offset = -0.0f;
    args.other = call.kind == PLAIN ? RowsAt{} : call.at(call.other);
    args.sum = call.kind == ADD ? sum.data() : nullptr;
    args.gate = call.kind == GATED ? SILU : NO_GATE;
    error = rms(args, call.kind, call.dtype, call.wide, call.device);
  }
  const std::vector<double> got = y.read(), sums = sum.read();
  for (int64_t row = 0; row < call.rows(); ++row) {
    std::vector<double> in(call.x.row(row), call.x.row(row) + n);
    if (call.kind == ADD) {
      for (int64_t i = 0; i < n; ++i) {
        const double exact = in[i] + call.other.row(row)[i];
        in[i] = sums[row * n + i];
        worst.see(in[i], exact, call.unit * (std::abs(exact) + 0.01));
      }
    }
    const Row of(call, in.data());
    for (int64_t i = 0; i < n; ++i) {
      double expected = (of.x[i] - of.mean) * of.scale * call.weight.wide[i];
      expected *= call.kind == GATED ? silu(call.other.row(row)[i]) : 1.0;
      expected += call.kind == LAYER ? call.bias.wide[i] : 0.0;
      worst.see(got[row * n + i], expected, call.unit * 4 * (std::abs(expected) + 1.0));
    }
  }
  return error;
}

float* floats(Matrix& matrix) { return reinterpret_cast<float*>(matrix.data()); }

std::vector<double> total(const Matrix& parts) {
  const std::vector<double> all = parts.read();
  std::vector<double> of(parts.columns());
  for (size_t i = 0; i < all.size(); ++i) {
    of[i % of.size()] += all[i];
  }
  return of;
}

int backward(const Call& call, Worst& worst) {
  const int64_t n = call.n();
  const Matrix grad = normal(call.rows(), n, call.dtype, 5);
  Matrix x_grad(call.rows(), n, call.dtype), gate_grad(call.rows(), n, call.dtype);
  const BackwardPlan plan = plan_backward(call.rows(), n, call.kind, call.dtype, call.wide, call.device);
  Matrix weight_sums(plan.parts, n, FLOAT32), bias_sums(plan.parts, n, FLOAT32), statistics(call.rows(), 2, FLOAT32);
  BackwardArgs args{};
  args.grad = call.at(grad), args.x = call.at(call.x), args.weight = call.weight.data(), args.x_grad = x_grad.data();
  args.other = call.kind == ADD || call.kind == GATED ? call.at(call.other) : RowsAt{};
  args.gate_grad = call.kind == GATED ? gate_grad.data() : nullptr, args.gate = call.kind == GATED ? SILU : NO_GATE;
  args.weight_sums = floats(weight_sums), args.bias_sums = call.kind == LAYER ? floats(bias_sums) : nullptr;
  args.statistics = plan.each == 0 ? floats(statistics) : nullptr;
  args.rows = call.rows(), args.n = n, args.inverse = 1.0f / n, args.eps = EPS, args.offset = -0.0f;
  const int error = call.kind == LAYER ? layer_backward(args, call.dtype, call.wide, plan, call.device)
                                       : rms_backward(args, call.kind, call.dtype, call.wide, plan, call.device);
  const std::vector<double> got = x_grad.read(), got_gate = gate_grad.read();
  const std::vector<double> got_weight = total(weight_sums), got_bias = total(bias_sums);
  std::vector<double> of_weight(n), of_bias(n), most(n);
  for (int64_t row = 0; row < call.rows(); ++row) {
    const Row of(call, call.x.row(row));
    const double* const other = call.other.row(row);
    std::vector<double> by(n), h(n);
    double with_h = 0.0, constant = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      by[i] = grad.row(row)[i] * (call.kind == GATED ? silu(other[i]) : 1.0);
      h[i] = (of.x[i] - of.mean) * of.scale;
      with_h += by[i] * call.weight.wide[i] * h[i] / n;
      constant += call.kind == LAYER ? by[i] * call.weight.wide[i] / n : 0.0;
      of_weight[i] += by[i] * h[i];
      of_bias[i] += by[i];
      most[i] += std::abs(by[i] * h[i]) + std::abs(by[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      double expected = (by[i] * call.weight.wide[i] - constant - h[i] * with_h) * of.scale;
      expected += call.kind == ADD ? other[i] : 0.0;
      worst.see(got[row * n + i], expected, call.unit * 4 * (std::abs(expected) + std::max(1.0, of.scale)));
      if (call.kind == GATED) {
        const double gate = grad.row(row)[i] * h[i] * call.weight.wide[i] * silu_slope(other[i]);
        worst.see(got_gate[row * n + i], gate, call.unit * 4 * (std::abs(gate) + 1.0));
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) { // sums of float32, of values that are not rounded
    worst.see(got_weight[i], of_weight[i], 1e-5 * (most[i] + 1.0));
    if (call.kind == LAYER) {
      worst.see(got_bias[i], of_bias[i], 1e-5 * (most[i] + 1.0));
    }
  }
  return error;
}

// x is one's parts, `other` the other's.
int parts(const Call& call, Worst& worst) {
  const Matrix* const from[] = {&call.x, &call.other};
  Matrix to[] = {Matrix(1, call.n(), call.dtype), Matrix(1, call.n(), call.dtype)};
  std::vector<Matrix> sums;
  for (const Matrix* parts : from) {
    sums.emplace_back(call.rows(), call.n(), FLOAT32, [&](int64_t i) { return parts->wide[i]; });
  }
  const int error = add_parts(floats(sums[0]), to[0].data(), floats(sums[1]), to[1].data(), call.rows(), call.n(), call.dtype,
                              call.device);
  for (int which = 0; which < 2; ++which) {
    const std::vector<double> got = to[which].read(), expected = total(sums[which]);
    for (int64_t i = 0; i < call.n(); ++i) {
      worst.see(got[i], expected[i], call.unit * 2 * (std::abs(expected[i]) + 1.0));
    }
  }
  return error;
}

} // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    model::fail("arguments are missing");
  }
  values::set_copies(arguments[1]);
  const std::string type = arguments[2], filled = arguments[6], op = arguments[7];
  const Dtype dtype = type == "bfloat16" ? BFLOAT16 : type == "float16" ? FLOAT16 : FLOAT32;
  const int64_t rows = number(arguments[3]), n = number(arguments[4]), size = dtype == FLOAT32 ? 4 : 2;
  const int multiprocessors = static_cast<int>(number(arguments[5]));
  const int cache = filled == "cached" ? 1 << 30 : multiprocessors << 14;
  const Device device{0, multiprocessors, 2048, 232448, cache, 90, nullptr};
  const bool is_backward = op.find("_backward") != std::string::npos;
  const std::string name = op.substr(0, op.find('_'));
  const Kind kind = name == "layer" ? LAYER : name == "add" ? ADD : name == "gated" ? GATED : PLAIN;

  std::mt19937 random(1);
  std::normal_distribution<float> of;
  const int64_t columns = filled == "apart" ? n + 1 : n;
  const Matrix x(rows, columns, dtype, [&](int64_t i) {
    const float row = static_cast<float>(i / columns % 3), value = filled == "equal" ? 0.0f : of(random);
    if (filled == "huge") {
      return 1e17f * value + 1e19f * (row + 1.0f);
    }
    return filled == "far" ? value + 50.0f * row : filled == "equal" ? 1000.0f * (row + 1.1f) : value;
  });
  const Matrix other = normal(rows, columns, dtype, 2), weight = normal(1, n, dtype, 3), bias = normal(1, n, dtype, 4);
  const bool wide = columns * size % 16 == 0 && n * size % 16 == 0;
  // In float32 that of a sum, too.
  const double unit = dtype == BFLOAT16 ? 0x1p-8 : dtype == FLOAT16 ? 0x1p-11 : 0x1p-20;
  const Call call{dtype, device, kind, x, other, weight, bias, wide, unit};
  Worst worst;
  const int error = op == "parts" ? parts(call, worst) : is_backward ? backward(call, worst) : forward(call, worst);
  if (error != 0) {
    model::fail("the launch returned error %d", error);
  }
  return worst.report(op.c_str());
}
