#pragma once

inline float cube_of(float x) {
  return x * x * x;
}
