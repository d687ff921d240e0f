#include "../rotary_cpu/rotary.h"

#include "launch.h"
#include "operands.h"

namespace kernelhub {

namespace {

constexpr const char* NAME = "rotate";

struct Sizes {
  int64_t batch, tokens, rotary;
  int64_t tokens_dim, first; // `first` is 1 where there is a batch dimension, else 0
};

// The tensor, or a copy where its innermost elements lie apart.
Tensor laid(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// Of a tensor of such sizes; 0 for a stride where there is no such dimension, or but one element along it. `wide` stays true
// where all lies at multiples of 16 bytes.
Steps steps(const Tensor& tensor, int64_t heads_dim, int64_t tokens_dim, int64_t first, bool& wide) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const auto stride = [&](int64_t dim) { return dim < 0 || tensor.size(dim) == 1 ? 0 : tensor.stride(dim) * size; };
  const Steps found{static_cast<char*>(tensor.data_ptr()), stride(first - 1), stride(tokens_dim), stride(heads_dim)};
  wide = wide && aligned(found.data) && (found.batch | found.token | found.head) % 16 == 0;
  return found;
}

void check_on(const char* what, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == q.get_device_index(), NAME,
      ": expected all tensors on one device; ", what, " is not on q's GPU");
}

void check_heads(const char* what, const Tensor& x, const Tensor& q, const Sizes& of) {
  check_on(what, x, q);
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), NAME, ": ", what, " has another dtype than q");
  STD_TORCH_CHECK(x.dim() == q.dim(), NAME, ": ", what, " has ", x.dim(), " dimensions and q has ", q.dim());
  STD_TORCH_CHECK(
      (of.first == 0 || x.size(0) == of.batch) && x.size(of.tokens_dim) == of.tokens, NAME, ": ", what,
      " has other batches or tokens than q");
  STD_TORCH_CHECK(
      x.size(x.dim() - 1) >= of.rotary, NAME, ": ", what, " has heads of ", x.size(x.dim() - 1),
      " elements; expected at least rotary_dim, ", of.rotary);
}

void check_table(const char* what, const Tensor& table, const Tensor& cos, const Tensor& q, const Sizes& of) {
  check_on(what, table, q);
  STD_TORCH_CHECK(table.dim() == q.dim() - 1, NAME, ": ", what, " has ", table.dim(), " dimensions; expected ", q.dim() - 1);
  STD_TORCH_CHECK(
      (of.first == 0 || table.size(0) == of.batch || table.size(0) == 1) && table.size(of.first) == of.tokens, NAME,
      ": ", what, " has other batches or tokens than q");
  const int64_t last = table.size(table.dim() - 1);
  STD_TORCH_CHECK(
      last == of.rotary || 2 * last == of.rotary, NAME, ": ", what, " has ", last,
      " elements for a token; expected rotary_dim, ", of.rotary, ", or half as many");
  STD_TORCH_CHECK(
      table.scalar_type() == cos.scalar_type() && last == cos.size(cos.dim() - 1), NAME,
      ": cos and sin are of different shapes or dtypes");
}

// As `x`, without values: contiguous, or, where tokens lie outside heads in memory and the dimensions are the other way
// round, as x lies there.
Tensor new_like(const Tensor& x, const Sizes& of) {
  const int64_t dims = x.dim(), outer = of.first, inner = of.first + 1;
  const bool swapped = x.stride(outer) < x.stride(inner);
  std::array<int64_t, 4> sizes, strides;
  for (int64_t dim = 0; dim < dims; ++dim) {
    sizes[dim] = x.size(dim);
  }
  const auto at_least_one = [&](int64_t dim) { return std::max<int64_t>(sizes[dim], 1); };
  strides[dims - 1] = 1;
  strides[swapped ? outer : inner] = at_least_one(dims - 1);
  strides[swapped ? inner : outer] = at_least_one(dims - 1) * at_least_one(swapped ? outer : inner);
  if (of.first == 1) {
    strides[0] = at_least_one(1) * at_least_one(2) * at_least_one(3);
  }
  return new_strided(dims, sizes.data(), strides.data(), x.scalar_type(), x.get_device_index());
}

} // namespace

std::tuple<Tensor, Tensor> rotate(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t heads_dim, int64_t rotary_dim,
    int64_t form) {
  check_on("q", q, q);
  const int64_t first = q.dim() - 3;
  STD_TORCH_CHECK(first == 0 || first == 1, NAME, ": q has ", q.dim(), " dimensions; expected 3 or 4");
  STD_TORCH_CHECK(
      heads_dim == first || heads_dim == first + 1, NAME, ": heads_dim is ", heads_dim, "; expected ", first, " or ",
      first + 1);
  STD_TORCH_CHECK(
      rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= 1024, NAME, ": rotary_dim is ", rotary_dim,
      "; expected an even number up to 1024");
  STD_TORCH_CHECK(form >= 0 && form < FORMS, NAME, ": form is ", form, "; expected 0 to 15");
  const int64_t tokens_dim = 2 * first + 1 - heads_dim;
  const Sizes of{first == 1 ? q.size(0) : 1, q.size(tokens_dim), rotary_dim, tokens_dim, first};
  const Dtype dtype = dtype_of(q, NAME);
  check_heads("q", q, q, of);
  check_heads("k", k, q, of);
  check_table("cos", cos, cos, q, of);
  check_table("sin", sin, cos, q, of);
  const bool own_table = cos.scalar_type() == q.scalar_type();
  STD_TORCH_CHECK(
      own_table || (cos.scalar_type() == ScalarType::Float && (form & ROUND_ONCE)), NAME,
      ": cos and sin are of another dtype than q; expected the same, or float32 and rounding once");

  const Tensor inputs[2] = {laid(q), laid(k)}, results[2] = {new_like(q, of), new_like(k, of)};
  if (q.numel() + k.numel() == 0) {
    return {results[0], results[1]};
  }
  const OnDevice device(q);
  const Tensor cosines = laid(cos), sines = laid(sin);
  const int64_t pack = 16 / static_cast<int64_t>(q.element_size()), last = cos.size(cos.dim() - 1);
  bool wide = rotary_dim % (2 * pack) == 0 && last % pack == 0;
  RotateArgs args{};
  for (int which = 0; which < 2; ++which) {
    args.x[which] = steps(inputs[which], heads_dim, tokens_dim, first, wide);
    args.y[which] = steps(results[which], heads_dim, tokens_dim, first, wide);
    args.heads[which] = static_cast<int>(inputs[which].size(heads_dim));
    args.width[which] = static_cast<int>(inputs[which].size(first + 2));
    wide = wide && args.width[which] % pack == 0;
  }
  args.cos = steps(cosines, -1, first, first, wide);
  args.sin = steps(sines, -1, first, first, wide);
  args.batches = of.batch;
  args.tokens = of.tokens;
  args.rotary = static_cast<int>(rotary_dim);
  args.form = static_cast<int>(form);
  args.paired = last != rotary_dim;
  check_launch(rotate(args, dtype, !own_table, wide, device));
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor> tables(
    const Tensor& inv_freq, const Tensor& positions, double scale, int64_t dtype, int64_t layout) {
  constexpr const char* name = "tables";
  STD_TORCH_CHECK(
      positions.is_cuda() && inv_freq.is_cuda() && inv_freq.get_device_index() == positions.get_device_index(), name,
      ": expected inv_freq and positions on one GPU");
  STD_TORCH_CHECK(
      inv_freq.dim() == 1 && positions.dim() == 2, name, ": inv_freq has ", inv_freq.dim(), " dimensions and positions ",
      positions.dim(), "; expected 1 and 2");
  const bool of_64_bits = positions.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      of_64_bits || positions.scalar_type() == ScalarType::Int, name, ": positions are neither int64 nor int32");
  STD_TORCH_CHECK(dtype >= FLOAT32 && dtype <= FLOAT16, name, ": dtype is ", dtype, "; expected 0 to 2");
  STD_TORCH_CHECK(layout >= 0 && layout < LAYOUTS, name, ": layout is ", layout, "; expected 0 to 2");

  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}; // by Dtype
  const int64_t pairs = inv_freq.size(0), width = layout == PAIRS ? pairs : 2 * pairs;
  const int64_t batches = positions.size(0), tokens = positions.size(1), row = std::max<int64_t>(width, 1);
  const std::array<int64_t, 3> sizes{batches, tokens, width}, strides{std::max<int64_t>(tokens, 1) * row, row, 1};
  const auto made = [&] { return new_strided(3, sizes.data(), strides.data(), types[dtype], positions.get_device_index()); };
  const Tensor cos = made(), sin = made();
  const int64_t of_position = of_64_bits ? 8 : 4;
  const TablesArgs args{
      static_cast<const char*>(inv_freq.data_ptr()),
      static_cast<const char*>(positions.data_ptr()),
      static_cast<char*>(cos.data_ptr()),
      static_cast<char*>(sin.data_ptr()),
      inv_freq.stride(0) * static_cast<int64_t>(inv_freq.element_size()),
      positions.stride(0) * of_position,
      positions.stride(1) * of_position,
      batches * tokens,
      tokens,
      pairs,
      static_cast<float>(scale),
      dtype_of(inv_freq, name),
      of_64_bits,
      static_cast<int>(layout)};
  if (args.rows * pairs != 0) {
    const OnDevice device(positions);
    check_launch(tables(args, static_cast<Dtype>(dtype), device));
  }
  return {cos, sin};
}

} // namespace kernelhub
