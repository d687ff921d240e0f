// Tensors as rows: where each row of the last dimension lies, threads over rows, and new tensors.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "level.h"
#include "types.h"

namespace kernelhub {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that one thread takes at least: waking another costs about 3 us, in which one core passes over as many.
constexpr int64_t GRAIN = 16384;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return FLOAT32;
    case ScalarType::BFloat16:
      return BFLOAT16;
    case ScalarType::Half:
      return FLOAT16;
    default:
      STD_TORCH_CHECK(false, name, ": the input is neither float32 nor bfloat16 nor float16");
      return FLOAT32;
  }
}

inline void check_same(const char* name, const char* what, const Tensor& other, const Tensor& x) {
  STD_TORCH_CHECK(other.is_cpu(), name, ": expected all tensors on one device; the ", what, " is not on the CPU");
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), name, ": the ", what, " has another dtype than the input");
  bool same = other.dim() == x.dim();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) {
    same = other.size(dim) == x.size(dim);
  }
  STD_TORCH_CHECK(same, name, ": the ", what, " has another shape than the input");
}

// The rows of a tensor whose elements lie side by side within each row; the leading dimensions have any strides.
class RowsOf {
 public:
  // Copies the tensor where the elements of a row do not lie side by side.
  explicit RowsOf(const Tensor& tensor) : tensor_(tensor) {
    const int64_t dims = tensor.dim(), n = tensor.size(dims - 1);
    const bool apart = n > 1 && tensor.stride(dims - 1) != 1;
    if (!tensor.is_contiguous() && (apart || !read_strides())) {
      tensor_ = torch::stable::contiguous(tensor);
      dims_ = 0;
    }
    if (dims_ == 0) {
      dims_ = 1;
      sizes_[0] = std::numeric_limits<int64_t>::max();
      strides_[0] = n;
    }
    data_ = static_cast<const char*>(tensor_.data_ptr());
    for (int dim = 0; dim < dims_; ++dim) {
      strides_[dim] *= static_cast<int64_t>(tensor_.element_size());
    }
  }

  const void* operator[](int64_t row) const {
    const char* at = data_;
    for (int dim = dims_ - 1; dim > 0; --dim) {
      at += row % sizes_[dim] * strides_[dim];
      row /= sizes_[dim];
    }
    return at + row * strides_[0];
  }

 private:
  // The leading dimensions, those merged that one stride steps through. False where too many are left.
  bool read_strides() {
    const auto sizes = tensor_.sizes(), strides = tensor_.strides();
    dims_ = 0;
    for (int64_t dim = 0; dim + 1 < tensor_.dim(); ++dim) {
      if (sizes[dim] == 1) {
        continue;
      }
      if (dims_ > 0 && strides_[dims_ - 1] == strides[dim] * sizes[dim]) {
        sizes_[dims_ - 1] *= sizes[dim];
      } else if (dims_ == MOST) {
        return false;
      } else {
        sizes_[dims_++] = sizes[dim];
      }
      strides_[dims_ - 1] = strides[dim];
    }
    return true;
  }

  static constexpr int MOST = 6;
  Tensor tensor_;
  const char* data_ = nullptr;
  int dims_ = 0;
  std::array<int64_t, MOST> sizes_{};
  std::array<int64_t, MOST> strides_{};
};

// Tells the system that pages of 2 MiB may stand behind new memory that will be written from end to end. Above 32 MiB the
// C library asks for each tensor's memory anew, and then the 4 KiB pages, each of which is faulted in and zeroed by
// itself, take most of an operation's time: a new 4096 x 8192 in float32, written by two threads, takes 61 ms, so 14 ms.
// Only a hint: what comes of it the system's settings decide.
inline void expect_large_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes >= static_cast<int64_t>(2 * PAGE)) { // so that one lies inside, wherever the memory begins
    const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
    const uintptr_t first = (at + PAGE - 1) / PAGE * PAGE, end = (at + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
}

// A contiguous tensor without values, on the CPU, of the shape of `like`; `last`, where given, is its last dimension's
// size. Not by `torch::stable::empty`, which goes through the dispatcher: 0.5 us.
inline Tensor new_tensor(const Tensor& like, ScalarType dtype, int64_t last = -1) {
  std::array<int64_t, 64> sizes, strides;
  const int64_t dims = like.dim();
  STD_TORCH_CHECK(dims <= static_cast<int64_t>(sizes.size()), "the input has ", dims, " dimensions; expected at most 64");
  const auto given = like.sizes();
  int64_t stride = 1;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    sizes[dim] = dim == dims - 1 && last >= 0 ? last : given[dim];
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor tensor(made);
  expect_large_pages(tensor.data_ptr(), stride * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

inline Tensor new_row(int64_t n, ScalarType dtype) {
  const int64_t stride = 1;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &n, &stride, static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// `each(row)` for all rows of n elements, by as many threads as pay.
template <typename Each>
void for_rows(int64_t rows, int64_t n, const Each& each) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(n, 1));
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      each(row);
    }
  };
  if (rows <= grain) {
    part(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, part);
  }
}

// The level in use: the processor's, or the lower one that a test asked for.
inline std::atomic<int>& level_in_use() {
  static std::atomic<int> level{detect_level()};
  return level;
}

} // namespace kernelhub
