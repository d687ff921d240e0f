#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace {

__global__ void scale_kernel(float* output, const float* input, float factor, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) {
    output[at] = input[at] * factor;
  }
}

} // namespace

void scale(torch::stable::Tensor& output, const torch::stable::Tensor& input, double factor) {
  STD_TORCH_CHECK(input.is_cuda() && output.is_cuda(), "scale takes tensors on a GPU");
  STD_TORCH_CHECK(input.is_contiguous() && output.is_contiguous(), "scale takes contiguous tensors");
  STD_TORCH_CHECK(input.numel() == output.numel(), "input and output have different sizes");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  const int64_t count = input.numel();
  if (count == 0) {
    return;
  }
  const int threads = 256;
  const auto blocks = static_cast<unsigned int>((count + threads - 1) / threads);
  scale_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<float*>(output.data_ptr()), static_cast<const float*>(input.data_ptr()), static_cast<float>(factor), count);
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "the kernel could not be started");
}
