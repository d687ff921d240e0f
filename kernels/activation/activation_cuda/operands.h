// Tensors on a GPU as rows: checks, where the rows lie, new tensors, the device and its current stream.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include <cuda_runtime_api.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "device.h"

namespace kernelhub {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline void check_device(const char* name, const char* what, const Tensor& other, const Tensor& x) {
  STD_TORCH_CHECK(
      other.is_cuda() && other.get_device_index() == x.get_device_index(), name,
      ": expected all tensors on one device; the ", what, " is not on the input's GPU");
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), name, ": the ", what, " has another dtype than the input");
}

inline void check_same(const char* name, const char* what, const Tensor& other, const Tensor& x) {
  check_device(name, what, other, x);
  const auto sizes = x.sizes(), others = other.sizes();
  STD_TORCH_CHECK(
      sizes.size() == others.size() && std::equal(sizes.begin(), sizes.end(), others.begin()), name, ": the ", what,
      " has another shape than the input");
}

// The device that an op runs on, the current one while this lives; and its current stream.
class OnDevice : public Device {
 public:
  explicit OnDevice(const Tensor& x) : OnDevice(x.get_device_index()) {}

  explicit OnDevice(int32_t index) {
    int current = -1;
    STD_CUDA_CHECK(cudaGetDevice(&current));
    if (current != index) { // the guard costs more than to ask
      guard_.emplace(index);
    }
    static_cast<Device&>(*this) = properties(index);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

 private:
  static constexpr int MOST = 64;

  // Asked once: what a device says of itself does not change.
  static const Device& properties(int32_t index) {
    static const std::array<Device, MOST> known = [] {
      std::array<Device, MOST> found{};
      int count = 0;
      STD_CUDA_CHECK(cudaGetDeviceCount(&count));
      for (int device = 0; device < std::min(count, MOST); ++device) {
        int major = 0, minor = 0;
        Device& of = found[device];
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&of.multiprocessors, cudaDevAttrMultiProcessorCount, device));
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&of.threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&of.cache, cudaDevAttrL2CacheSize, device));
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&of.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
        of.index = device;
        of.capability = 10 * major + minor;
      }
      return found;
    }();
    STD_TORCH_CHECK(index >= 0 && index < MOST, "expected a GPU with a number below ", MOST, "; this is ", index);
    return known[index];
  }

  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// A tensor's rows; `wide` where each begins at a multiple of 16 bytes.
class RowsOf {
 public:
  // Copies the tensor where the elements of a row do not lie side by side, or the rows in too many ways.
  explicit RowsOf(const Tensor& tensor) : tensor_(tensor) {
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    const auto shape = tensor.sizes();
    const int64_t last = shape[shape.size() - 1];
    if (tensor.is_contiguous()) {
      merged(last);
    } else if ((last > 1 && tensor.stride(tensor.dim() - 1) != 1) || !read_strides()) {
      tensor_ = torch::stable::contiguous(tensor);
      merged(last);
    }
    at.data = static_cast<const char*>(tensor_.data_ptr());
    at.stride = strides_[0] * size;
    auto bits = reinterpret_cast<uintptr_t>(at.data) | static_cast<uintptr_t>(at.stride);
    at.others = dims_ - 1;
    for (int dim = 1; dim < dims_; ++dim) {
      leading.strides[dim - 1] = strides_[dim] * size;
      leading.sizes[dim - 1] = sizes_[dim];
      bits |= static_cast<uintptr_t>(strides_[dim] * size);
    }
    wide = bits % 16 == 0;
  }

  RowsAt at{};
  Leading leading{};
  bool wide;

 private:
  void merged(int64_t n) {
    dims_ = 1;
    strides_[0] = n;
  }

  // The leading dimensions. False where too many are left.
  bool read_strides() {
    const auto shape = tensor_.sizes(), steps = tensor_.strides();
    dims_ = 0;
    for (size_t dim = 0; dim + 1 < shape.size(); ++dim) {
      if (shape[dim] == 1) {
        continue;
      }
      if (dims_ > 0 && strides_[dims_ - 1] == steps[dim] * shape[dim]) {
        sizes_[dims_ - 1] *= shape[dim];
      } else if (dims_ == MOST) {
        return false;
      } else {
        sizes_[dims_++] = shape[dim];
      }
      strides_[dims_ - 1] = steps[dim];
    }
    if (dims_ == 0) {
      merged(0);
    }
    return true;
  }

  static constexpr int MOST = Leading::MOST + 1;
  Tensor tensor_;
  int dims_ = 0;
  int64_t strides_[MOST];
  int64_t sizes_[MOST];
};

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline Tensor new_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype, int32_t index) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, static_cast<int32_t>(dtype), aoti_torch_device_type_cuda(), index, &made));
  return Tensor(made);
}

// A contiguous tensor without values, of the shape and dtype of `like` and on its device; `last`, where given, is its last
// dimension's size. Not by `torch::stable::empty`, which goes through the dispatcher.
inline Tensor new_tensor(const Tensor& like, int64_t last = -1) {
  std::array<int64_t, 64> sizes, strides;
  const auto given = like.sizes();
  const int64_t dims = static_cast<int64_t>(given.size());
  int64_t stride = 1;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    sizes[dim] = dim == dims - 1 && last >= 0 ? last : given[dim];
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  return new_strided(dims, sizes.data(), strides.data(), like.scalar_type(), like.get_device_index());
}

inline Tensor new_row(int64_t n, ScalarType dtype, const Tensor& like) {
  const int64_t stride = 1;
  return new_strided(1, &n, &stride, dtype, like.get_device_index());
}

inline void check_launch(int error) { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }

} // namespace kernelhub
