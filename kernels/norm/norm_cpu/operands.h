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

#include "level.h"

namespace kernelhub {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that one thread takes at least: waking another costs about 3 us, in which one core passes over as many.
constexpr int64_t GRAIN = 16384;

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

// A contiguous tensor without values, on the CPU. Not by `torch::stable::empty`, which goes through the dispatcher: 0.5 us.
inline Tensor new_tensor(const Tensor& like, ScalarType dtype) {
  const auto sizes = like.sizes();
  std::array<int64_t, 64> strides;
  int64_t stride = 1;
  for (int64_t dim = like.dim() - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), sizes.data(), strides.data(), static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor new_tensor(int64_t first, int64_t second, ScalarType dtype) {
  const int64_t sizes[] = {first, second}, strides[] = {std::max<int64_t>(second, 1), 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
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
