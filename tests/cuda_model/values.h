// What the mains share: matrices of random values and the largest error.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "model.h"

namespace values {

using kernelhub::Dtype;

// Of rows and columns, aligned to 16 bytes as the kernels take it; `wide` has the values that it was rounded to.
class Matrix {
 public:
  std::vector<double> wide;

  // Without values: NaN, so that what a kernel leaves out shows.
  Matrix(int64_t rows, int64_t columns, Dtype dtype)
      : rows_(rows), columns_(columns), dtype_(dtype), size_(dtype == kernelhub::FLOAT32 ? 4 : 2),
        bytes_(rows * columns * size_ + 16, '\xff') {}

  template <typename Value>
  Matrix(int64_t rows, int64_t columns, Dtype dtype, const Value& value) : Matrix(rows, columns, dtype) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      set(i, static_cast<float>(value(i)));
    }
    wide = read();
  }

  char* data() { return bytes_.data() + (16 - reinterpret_cast<uintptr_t>(bytes_.data()) % 16) % 16; }
  const char* data() const { return const_cast<Matrix*>(this)->data(); }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  const double* row(int64_t i) const { return wide.data() + i * columns_; }

  std::vector<double> read() const {
    std::vector<double> all(rows_ * columns_);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = get(static_cast<int64_t>(i));
    }
    return all;
  }

 private:
  float get(int64_t i) const {
    const char* const at = data() + i * size_;
    if (dtype_ == kernelhub::FLOAT32) {
      return *reinterpret_cast<const float*>(at);
    }
    return dtype_ == kernelhub::BFLOAT16 ? __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at))
                                         : __half2float(*reinterpret_cast<const __half*>(at));
  }
  void set(int64_t i, float value) {
    char* const at = data() + i * size_;
    if (dtype_ == kernelhub::FLOAT32) {
      *reinterpret_cast<float*>(at) = value;
    } else if (dtype_ == kernelhub::BFLOAT16) {
      *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16_rn(value);
    } else {
      *reinterpret_cast<__half*>(at) = __float2half_rn(value);
    }
  }

  int64_t rows_, columns_;
  Dtype dtype_;
  int64_t size_;
  std::vector<char, model::Shared<char>> bytes_;
};

inline Matrix normal(int64_t rows, int64_t columns, Dtype dtype, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> of;
  return Matrix(rows, columns, dtype, [&](int64_t) { return of(random); });
}

// The largest difference, as part of what is allowed there.
class Worst {
 public:
  void see(double got, double expected, double allowed) {
    const double part = std::abs(got - expected) / allowed;
    if (!std::isnan(most_) && !(part <= most_)) { // NaN stays
      most_ = part;
    }
  }

  // The process's exit status.
  int report(const char* what) const {
    const bool right = most_ <= 1.0;
    fprintf(right ? stdout : stderr, "%s: the largest error is %.3g of what is allowed\n", what, most_);
    return right ? 0 : 1;
  }

 private:
  double most_ = 0.0;
};

// What an argument says.
inline int64_t number(const char* text) { return strtoll(text, nullptr, 10); }

inline void set_copies(const std::string& when) {
  if (when != "early" && when != "late" && when != "any") {
    model::fail("copies are early, late or any; got %s", when.c_str());
  }
  model::copies = when == "early" ? model::EARLY : when == "late" ? model::LATE : model::ANY;
}

} // namespace values
