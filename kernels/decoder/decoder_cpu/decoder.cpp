#include "decoder.h"

#include "operands.h"
#include "products.h"

namespace kernelhub {

namespace {

constexpr const char* NAME = "gated_mlp";

// Weights of which a thread takes at least the products: waking another costs about 3 us.
constexpr int64_t WEIGHTS = 32768;

void check_operand(const char* what, const Tensor& of, const Tensor& x) {
  STD_TORCH_CHECK(of.is_cpu(), NAME, ": expected all tensors on one device; the ", what, " is not on the CPU");
  STD_TORCH_CHECK(of.scalar_type() == x.scalar_type(), NAME, ": the ", what, " has another dtype than the input");
}

void check_weight(const char* what, const Tensor& of, const Tensor& x, int64_t outputs, int64_t inputs) {
  check_operand(what, of, x);
  STD_TORCH_CHECK(
      of.dim() == 2 && of.size(0) == outputs && of.size(1) == inputs, NAME, ": the ", what, " is not of shape (", outputs,
      ", ", inputs, ")");
  STD_TORCH_CHECK(of.is_contiguous(), NAME, ": the ", what, " is not contiguous");
}

// Null where there is none.
const char* row_of(const char* what, const std::optional<Tensor>& of, const Tensor& x, int64_t n) {
  if (!of) {
    return nullptr;
  }
  check_operand(what, *of, x);
  STD_TORCH_CHECK(of->dim() == 1 && of->size(0) == n, NAME, ": the ", what, " is not of shape (", n, ")");
  STD_TORCH_CHECK(of->is_contiguous(), NAME, ": the ", what, " is not contiguous");
  return static_cast<const char*>(of->data_ptr());
}

// Where rows of n elements begin, in floats: not a multiple of 4 KiB, so that several rows fit into the first cache; and with
// room for zeros up to whole vectors.
int64_t stride_of(int64_t n) {
  return (n + 1023) / 1024 * 1024 + 512;
}

int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

// `part(begin, end)` for parts of the outputs, each of which has as many weights, by as many threads as pay.
template <typename Part>
void for_outputs(int64_t outputs, int64_t weights, const Part& part) {
  const int64_t grain = std::max<int64_t>(1, WEIGHTS / std::max<int64_t>(weights, 1));
  if (outputs > grain) {
    torch::stable::parallel_for(0, outputs, grain, part);
  } else if (outputs > 0) {
    part(0, outputs);
  }
}

} // namespace

int64_t use_level(int64_t level) {
  level_in_use() = static_cast<int>(std::clamp<int64_t>(level, PLAIN, detect_level()));
  return level_in_use();
}

Tensor gated_mlp(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& norm, double eps, int64_t form,
    const Tensor& gate, const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up,
    const std::optional<Tensor>& up_bias, const Tensor& down, const std::optional<Tensor>& down_bias, int64_t function) {
  STD_TORCH_CHECK(x.is_cpu(), NAME, ": expected all tensors on one device; the input is not on the CPU");
  STD_TORCH_CHECK(x.dim() > 0, NAME, ": the input has no dimension");
  STD_TORCH_CHECK(gate.dim() == 2 && down.dim() == 2, NAME, ": expected weights of two dimensions");
  STD_TORCH_CHECK(form >= 0 && form < FORMS, NAME, ": form is ", form, "; expected 0, 1 or 2");
  STD_TORCH_CHECK(
      function == SILU || function == GELU_TANH, NAME, ": function is ", function, "; expected 0 or 2");
  const int64_t hidden = x.size(x.dim() - 1), between = down.size(1), outputs = down.size(0);
  check_weight("gate's weight", gate, x, up ? between : 2 * between, hidden);
  if (up) {
    check_weight("up's weight", *up, x, between, hidden);
  }
  check_weight("down's weight", down, x, outputs, between);
  const char* const norm_row = row_of("norm's weight", norm, x, hidden);
  const char* const gate_row = row_of("gate's bias", gate_bias, x, up ? between : 2 * between);
  const char* up_row = row_of("up's bias", up_bias, x, between);
  const char* const down_row = row_of("down's bias", down_bias, x, outputs);
  if (residual) {
    check_same(NAME, "residual", *residual, x);
    STD_TORCH_CHECK(outputs == hidden, NAME, ": with a residual, expected as many outputs as inputs");
  }
  const Dtype dtype = dtype_of(x, NAME);
  const Table& table = table_of(static_cast<Level>(level_in_use().load(std::memory_order_relaxed)));
  const auto product = table.product[dtype];
  const int64_t size = static_cast<int64_t>(x.element_size());
  const void* const gate_weight = gate.data_ptr();
  const void* up_weight;
  if (up) {
    up_weight = up->data_ptr();
  } else {
    up_weight = static_cast<const char*>(gate_weight) + between * hidden * size;
    up_row = gate_row == nullptr ? nullptr : gate_row + between * size;
  }
  const Tensor y = new_tensor(x, x.scalar_type(), outputs);
  int64_t rows = 1; // of no elements, too: what they give are the biases
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    rows *= x.size(dim);
  }
  const int64_t most = std::min(rows, ROWS), x_stride = stride_of(hidden), stride = stride_of(between);
  const int64_t y_stride = stride_of(outputs);
  const Tensor memory = new_row(
      most * (x_stride + 2 * stride + y_stride + (residual ? x_stride : 0)), ScalarType::Float);
  float* const normed = static_cast<float*>(memory.data_ptr());
  float* const gates = normed + most * x_stride;
  float* const ups = gates + most * stride;
  float* const downs = ups + most * stride;
  float* const sums = downs + most * y_stride;
  const RowsOf inputs(x), residuals(residual ? *residual : x);
  char* const results = static_cast<char*>(y.data_ptr());
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = std::min(ROWS, rows - first);
    for_rows(count, hidden, [&](int64_t r) {
      InputRow row{};
      row.x = inputs[first + r];
      row.residual = residual ? residuals[first + r] : nullptr;
      row.weight = norm_row;
      row.sum = sums + r * x_stride;
      row.y = normed + r * x_stride;
      row.n = hidden;
      row.padded = padded(hidden);
      row.eps = static_cast<float>(eps);
      row.form = norm_row == nullptr ? NO_NORM : static_cast<Form>(form);
      table.input[dtype](row);
    });
    for_outputs(between, 2 * hidden, [&](int64_t begin, int64_t end) {
      product({gate_weight, normed, gates, count, hidden, x_stride, stride, begin, end});
      product({up_weight, normed, ups, count, hidden, x_stride, stride, begin, end});
      for (int64_t r = 0; r < count; ++r) {
        Gated row{};
        row.gate = gates + r * stride + begin;
        row.up = ups + r * stride + begin;
        row.gate_bias = gate_row == nullptr ? nullptr : gate_row + begin * size;
        row.up_bias = up_row == nullptr ? nullptr : up_row + begin * size;
        row.n = end - begin;
        table.gated[dtype][function](row);
      }
    });
    for (int64_t r = 0; r < count; ++r) {
      std::fill(gates + r * stride + between, gates + r * stride + padded(between), 0.0f);
    }
    for_outputs(outputs, between, [&](int64_t begin, int64_t end) {
      product({down.data_ptr(), gates, downs, count, between, stride, y_stride, begin, end});
      for (int64_t r = 0; r < count; ++r) {
        OutputRow row{};
        row.x = downs + r * y_stride + begin;
        row.bias = down_row == nullptr ? nullptr : down_row + begin * size;
        row.residual = residual ? sums + r * x_stride + begin : nullptr;
        row.y = results + ((first + r) * outputs + begin) * size;
        row.n = end - begin;
        table.output[dtype](row);
      }
    });
  }
  return y;
}

} // namespace kernelhub
