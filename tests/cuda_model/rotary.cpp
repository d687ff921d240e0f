// The rotary kernels against float64. Arguments: an op, a dtype, and, of `rotate`, batches, tokens, heads of q and of k, elements
// of a head, those that are turned, the form's bits, the tables, where q and k lie, and the GPU's multiprocessors. Tables are
//   own     of the dtype, with an element for each that is turned
//   one     the same, of one batch for all
//   paired  of the dtype, with an element for each pair
//   wide    as `own`, in float32
// q and k lie
//   heads   as (batch, tokens, heads, head), without gaps
//   tokens  as (batch, heads, tokens, head), without gaps
//   parts   as `heads`, in one tensor with a head more, which nothing may read
//   odd     as `heads`, with an element between heads
// Of `tables`: batches, tokens, pairs, the layout, the positions' bits, and the GPU's multiprocessors.

#include <array>

#include "launch.h"
#include "values.h"

using namespace kernelhub;
using namespace values;

namespace {

int rotate(char** arguments, Dtype dtype) {
  const int64_t size = dtype == FLOAT32 ? 4 : 2, batches = number(arguments[0]), tokens = number(arguments[1]);
  const int heads[2] = {static_cast<int>(number(arguments[2])), static_cast<int>(number(arguments[3]))};
  const int64_t width = number(arguments[4]), rotary = number(arguments[5]), pairs = rotary / 2;
  const int form = static_cast<int>(number(arguments[6]));
  const std::string kind = arguments[7], lie = arguments[8];
  const Device device{0, static_cast<int>(number(arguments[9])), 2048, 232448, 0, 90, nullptr};
  const bool parts = lie == "parts", by_heads = lie == "tokens", paired = kind == "paired", wide_table = kind == "wide";
  const int64_t step = lie == "odd" ? width + 1 : width, all = heads[0] + heads[1] + 1;

  // Where a head begins, in elements, and the strides of batches, tokens and heads.
  const auto strides = [&](int which, bool result) {
    const int64_t in_row = parts && !result ? all : heads[which], of = result ? width : step;
    return by_heads ? std::array<int64_t, 3>{tokens * in_row * of, of, tokens * of}
                    : std::array<int64_t, 3>{tokens * in_row * of, in_row * of, of};
  };
  const auto steps = [&](const char* data, const std::array<int64_t, 3>& of, int64_t element) {
    return Steps{const_cast<char*>(data), batches == 1 ? 0 : of[0] * element, tokens == 1 ? 0 : of[1] * element, of[2] * element};
  };

  const Matrix both = normal(batches * tokens * all, width, dtype, 1);
  // With numbers behind the last row: what a thread too many writes is no NaN
  const Matrix alone[2] = {
      normal(batches * tokens * heads[0] + 1, step, dtype, 2), normal(batches * tokens * heads[1] + 1, step, dtype, 3)};
  const Matrix* const from[2] = {parts ? &both : &alone[0], parts ? &both : &alone[1]};
  const int64_t begin[2] = {0, parts ? heads[0] * width : 0};
  // Of a row more, which nothing may write
  Matrix to[2] = {Matrix(batches * tokens * heads[0] + 1, width, dtype), Matrix(batches * tokens * heads[1] + 1, width, dtype)};
  const int64_t table_batches = kind == "one" ? 1 : batches, table_width = paired ? pairs : rotary;
  const Dtype of_table = wide_table ? FLOAT32 : dtype;
  const Matrix tables[2] = {
      normal(table_batches * tokens, table_width, of_table, 4), normal(table_batches * tokens, table_width, of_table, 5)};

  RotateArgs args{};
  for (int which = 0; which < 2; ++which) {
    args.x[which] = steps(from[which]->data() + begin[which] * size, strides(which, false), size);
    args.y[which] = steps(to[which].data(), strides(which, true), size);
    args.heads[which] = heads[which];
    args.width[which] = static_cast<int>(width);
  }
  const std::array<int64_t, 3> of{table_batches == 1 ? 0 : tokens * table_width, table_width, 0};
  args.cos = steps(tables[0].data(), of, wide_table ? 4 : size);
  args.sin = steps(tables[1].data(), of, wide_table ? 4 : size);
  args.batches = batches, args.tokens = tokens, args.rotary = static_cast<int>(rotary);
  args.form = form, args.paired = paired;
  const int64_t pack = 16 / size;
  const bool wide = lie != "odd" && rotary % (2 * pack) == 0 && table_width % pack == 0 && width % pack == 0;
  if (const int error = kernelhub::rotate(args, dtype, wide_table, wide, device); error != 0) {
    model::fail("the launch returned error %d", error);
  }

  const double unit = dtype == BFLOAT16 ? 0x1p-8 : 0x1p-22;
  Worst worst;
  for (int which = 0; which < 2; ++which) {
    const std::vector<double> got = to[which].read();
    const auto in = strides(which, false), out = strides(which, true);
    for (int64_t batch = 0; batch < batches; ++batch) {
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t row = (table_batches == 1 ? 0 : batch) * tokens + token;
        for (int head = 0; head < heads[which]; ++head) {
          const double* const x = from[which]->wide.data() + begin[which] + batch * in[0] + token * in[1] + head * in[2];
          const double* const y = got.data() + batch * out[0] + token * out[1] + head * out[2];
          const auto see = [&](int64_t at, double a, double b) {
            worst.see(y[at], a + b, unit * 2.1 * (std::abs(a) + std::abs(b) + 1e-30));
          };
          for (int64_t pair = 0; pair < pairs; ++pair) {
            const bool together = form & INTERLEAVED;
            const int64_t first = together ? 2 * pair : pair, second = together ? 2 * pair + 1 : pairs + pair;
            const int64_t of_first = paired ? pair : first, of_second = paired ? pair : second;
            const double sign = form & INVERSE ? -1.0 : 1.0, sin_first = sign * tables[1].row(row)[of_first];
            const double sin_second = sign * tables[1].row(row)[of_second];
            // The matrix is ((cos, -sin), (sin, cos)), each row with the cosine and the sine of its own place.
            const double across_first = form & TRANSPOSED ? sin_second : -sin_first;
            const double across_second = form & TRANSPOSED ? -sin_first : sin_second;
            see(first, x[first] * tables[0].row(row)[of_first], x[second] * across_first);
            see(second, x[second] * tables[0].row(row)[of_second], x[first] * across_second);
          }
          for (int64_t rest = rotary; rest < width; ++rest) {
            worst.see(y[rest], x[rest], 1e-30);
          }
        }
      }
    }
    for (size_t i = got.size() - width; i < got.size(); ++i) {
      if (!std::isnan(got[i])) {
        model::fail("something is written behind the last row");
      }
    }
  }
  return worst.report("rotate");
}

int tables(char** arguments, Dtype dtype) {
  const int64_t batches = number(arguments[0]), tokens = number(arguments[1]), pairs = number(arguments[2]);
  const int layout = static_cast<int>(number(arguments[3]));
  const bool of_64_bits = number(arguments[4]) == 64;
  const Device device{0, static_cast<int>(number(arguments[5])), 2048, 232448, 0, 90, nullptr};
  const int64_t rows = batches * tokens, width = layout == PAIRS ? pairs : 2 * pairs, bytes = of_64_bits ? 8 : 4;
  std::mt19937 random(1);
  std::vector<int64_t> positions(rows), as_32(rows);
  for (int64_t i = 0; i < rows; ++i) {
    positions[i] = static_cast<int64_t>(random() % 4000);
    reinterpret_cast<int32_t*>(as_32.data())[i] = static_cast<int32_t>(positions[i]);
  }
  const Matrix inv_freq = normal(1, pairs, FLOAT32, 2);
  Matrix cos(rows + 1, width, dtype), sin(rows + 1, width, dtype);
  constexpr float SCALE = 1.25f;
  const TablesArgs args{
      inv_freq.data(), reinterpret_cast<const char*>(of_64_bits ? positions.data() : as_32.data()), cos.data(), sin.data(), 4,
      tokens * bytes, bytes, rows, tokens, pairs, SCALE, FLOAT32, of_64_bits, layout};
  if (const int error = kernelhub::tables(args, dtype, device); error != 0) {
    model::fail("the launch returned error %d", error);
  }
  const double unit = dtype == BFLOAT16 ? 0x1p-8 : 0x1p-21;
  const std::vector<double> cosines = cos.read(), sines = sin.read();
  Worst worst;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at < width; ++at) {
      const int64_t pair = layout == NEIGHBOURS ? at / 2 : at % pairs;
      const float angle = static_cast<float>(positions[row]) * static_cast<float>(inv_freq.wide[pair]); // rounded, as PyTorch's
      worst.see(cosines[row * width + at], SCALE * std::cos(static_cast<double>(angle)), unit * SCALE);
      worst.see(sines[row * width + at], SCALE * std::sin(static_cast<double>(angle)), unit * SCALE);
    }
  }
  for (int64_t at = rows * width; at < (rows + 1) * width; ++at) {
    if (!std::isnan(cosines[at]) || !std::isnan(sines[at])) {
      model::fail("something is written behind the last row");
    }
  }
  return worst.report("tables");
}

} // namespace

int main(int count, char** arguments) {
  const std::string op = count > 1 ? arguments[1] : "";
  if (count != (op == "tables" ? 9 : 13)) {
    model::fail("arguments are missing");
  }
  const Dtype dtype = std::string(arguments[2]) == "bfloat16" ? BFLOAT16 : FLOAT32;
  return op == "tables" ? tables(arguments + 3, dtype) : rotate(arguments + 3, dtype);
}
