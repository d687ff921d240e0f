// What rotary.cpp asks of the kernel: plain C++, without torch and without CUDA's headers.

#pragma once

#include <cstdint>

#include "device.h"

namespace kernelhub {

// The form, as bits.
enum Form {
  INTERLEAVED = 1, // pairs are elements 2i and 2i + 1, not i and i + rotary_dim / 2
  INVERSE = 2,     // by the negative angle
  TRANSPOSED = 4,  // the transposed matrix: what turns a gradient of the result into one of the input
  ROUND_ONCE = 8,  // computed in float32, rounded at the end; else products are rounded too
  FORMS = 16,
};

// Where the batches, tokens and heads of a tensor lie; strides in bytes.
struct Steps {
  char* data;
  int64_t batch, token, head;
};

struct RotateArgs {
  Steps x[2], y[2]; // of q and of k
  Steps cos, sin;
  int64_t batches, tokens;
  int heads[2];
  int width[2]; // of a head
  int rotary;   // of the elements that are turned
  int form;
  bool paired;  // cos and sin have one element for each pair
};

// How a table lies along a token, with an angle for each pair.
enum Layout {
  HALVES = 0,     // all of them, and all again
  NEIGHBOURS = 1, // each twice
  PAIRS = 2,      // each once
  LAYOUTS = 3,
};

struct TablesArgs {
  const char* inv_freq;
  const char* positions;
  char *cos, *sin;               // (rows, pairs or twice as many), contiguous
  int64_t step, batch, token;    // of inv_freq and of positions; in bytes
  int64_t rows, tokens, pairs;   // rows are tokens of all batches
  float scale;
  Dtype of_inv_freq;
  bool of_64_bits;               // positions; else of 32
  int layout;
};

// `wide`: whether all is aligned to 16 bytes, down to the halves of what is turned. Returns a cudaError_t.
int rotate(const RotateArgs& args, Dtype dtype, bool wide_table, bool wide, const Device& device);

// cos and sin of each position times each of inv_freq, times `scale`, rounded to the dtype. Returns a cudaError_t.
int tables(const TablesArgs& args, Dtype dtype, const Device& device);

} // namespace kernelhub
