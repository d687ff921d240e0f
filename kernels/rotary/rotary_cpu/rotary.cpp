#include "rotary.h"

#include "operands.h"
#include "parts.h"

namespace kernelhub {

namespace {

constexpr const char* NAME = "rotate";

// Tokens whose cos and sin are used for all heads before the next ones', so that they stay in the inner caches (64 x 128
// float32 of each are 64 KiB) and each head still has a piece of memory that is worth fetching ahead: of 40 heads x 2048
// tokens x 128 bfloat16 that lie head by head, 16 tokens take 2.2 times as long as a copy, 64 1.9, 256 1.9; of heads that lie
// token by token 1.6, 1.3, 1.4.
constexpr int64_t TOGETHER = 64;

struct Sizes {
  int64_t batch, tokens, rotary;
  int64_t tokens_dim, first; // `first` is 1 where there is a batch dimension, else 0
};

// A tensor whose innermost elements lie side by side; strides in elements.
struct Laid {
  explicit Laid(const Tensor& tensor) : tensor(tensor) {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
      this->tensor = torch::stable::contiguous(tensor);
    }
  }

  // 0 where there is no such dimension, or but one element along it.
  int64_t stride(int64_t dim) const { return dim < 0 || tensor.size(dim) == 1 ? 0 : tensor.stride(dim); }

  Tensor tensor;
};

// Where the batches, heads and tokens of a tensor lie; strides in elements.
struct Steps {
  Steps() = default;
  Steps(const Laid& laid, int64_t heads_dim, int64_t tokens_dim, int64_t first)
      : data(static_cast<char*>(laid.tensor.data_ptr())),
        size(static_cast<int64_t>(laid.tensor.element_size())),
        batch(laid.stride(first - 1)),
        head(laid.stride(heads_dim)),
        token(laid.stride(tokens_dim)) {}

  char* at(int64_t batches, int64_t tokens) const { return data + (batches * batch + tokens * token) * size; }

  char* data = nullptr;
  int64_t size = 0, batch = 0, head = 0, token = 0;
};

// q or k, its result, and what turns it.
struct Walk {
  Part of_tokens(int64_t batch, int64_t begin, int64_t end) const {
    Part some = part;
    some.tokens = end - begin;
    some.x = x.at(batch, begin);
    some.y = y.at(batch, begin);
    some.cos = cos.at(batch, begin);
    some.sin = sin.at(batch, begin);
    some.x_head = x.head;
    some.x_token = x.token;
    some.y_head = y.head;
    some.y_token = y.token;
    some.cos_token = cos.token;
    some.sin_token = sin.token;
    return some;
  }

  Part part{};
  Steps x, y, cos, sin;
};

void check_on_cpu(const char* what, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), NAME, ": expected all tensors on one device; ", what, " is not on the CPU");
}

void check_heads(const char* what, const Tensor& x, const Tensor& q, const Sizes& of) {
  check_on_cpu(what, x);
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
  check_on_cpu(what, table);
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
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), static_cast<int32_t>(x.scalar_type()), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor tensor(made);
  expect_large_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

} // namespace

int64_t use_level(int64_t level) {
  level_in_use() = static_cast<int>(std::clamp<int64_t>(level, PLAIN, detect_level()));
  return level_in_use();
}

std::tuple<Tensor, Tensor> rotate(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t heads_dim, int64_t rotary_dim,
    int64_t form) {
  check_on_cpu("q", q);
  const int64_t first = q.dim() - 3;
  STD_TORCH_CHECK(first == 0 || first == 1, NAME, ": q has ", q.dim(), " dimensions; expected 3 or 4");
  STD_TORCH_CHECK(
      heads_dim == first || heads_dim == first + 1, NAME, ": heads_dim is ", heads_dim, "; expected ", first, " or ",
      first + 1);
  STD_TORCH_CHECK(rotary_dim >= 0 && rotary_dim % 2 == 0, NAME, ": rotary_dim is ", rotary_dim, "; expected an even number");
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
  const Table table = !own_table ? WIDE_TABLE : form & ROUND_ONCE ? WIDE : ROUNDED;
  const auto run = parts_of(static_cast<Level>(level_in_use().load(std::memory_order_relaxed)))
                       .rotate[dtype][table][form & INTERLEAVED ? 1 : 0];

  const Laid cosines(cos), sines(sin), inputs[2] = {Laid(q), Laid(k)};
  const Laid results[2] = {Laid(new_like(q, of)), Laid(new_like(k, of))};
  std::array<Walk, 2> walks;
  int64_t elements = 0;
  for (int which = 0; which < 2; ++which) {
    const Laid &x = inputs[which], &y = results[which];
    Walk& walk = walks[which];
    walk.x = Steps(x, heads_dim, tokens_dim, first);
    walk.y = Steps(y, heads_dim, tokens_dim, first);
    walk.cos = Steps(cosines, -1, first, first);
    walk.sin = Steps(sines, -1, first, first);
    walk.part.heads = x.tensor.size(heads_dim);
    walk.part.width = x.tensor.size(first + 2);
    walk.part.rotary = rotary_dim;
    walk.part.paired = cos.size(first + 1) != rotary_dim;
    walk.part.inverse = form & INVERSE;
    walk.part.transposed = form & TRANSPOSED;
    elements += x.tensor.numel();
  }
  const auto tokens = [&](int64_t batch, int64_t begin, int64_t end) {
    for (const Walk& walk : walks) {
      run(walk.of_tokens(batch, begin, end));
    }
  };

  if (elements <= GRAIN) {
    for (int64_t batch = 0; elements > 0 && batch < of.batch; ++batch) {
      tokens(batch, 0, of.tokens);
    }
    return {results[0].tensor, results[1].tensor};
  }
  // Enough pieces for every thread, and none too small to be worth one.
  const int64_t each = elements / (of.batch * of.tokens); // of one token
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = std::max<int64_t>(1, GRAIN / std::max<int64_t>(each, 1));
  const int64_t share = (of.batch * of.tokens + threads - 1) / threads;
  const int64_t together = std::min(TOGETHER, std::max(worth, share));
  const int64_t pieces = (of.tokens + together - 1) / together;
  torch::stable::parallel_for(0, of.batch * pieces, std::max<int64_t>(1, worth / together), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t at = piece % pieces * together;
      tokens(piece / pieces, at, std::min(at + together, of.tokens));
    }
  });
  return {results[0].tensor, results[1].tensor};
}

} // namespace kernelhub
