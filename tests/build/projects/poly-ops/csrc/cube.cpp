#include "cube_impl.h"
#include "poly/poly.h"

torch::stable::Tensor cube(const torch::stable::Tensor& input) {
  return each(input, cube_of);
}
