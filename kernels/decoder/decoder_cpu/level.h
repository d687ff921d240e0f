// Which instructions this processor and this system have, asked for once.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kernelhub {

enum Level { PLAIN = 0, AVX2 = 1, AVX512 = 2 };

#if defined(__x86_64__)

// What the operating system saves of the registers, by XGETBV. As text, because the intrinsic asks for a flag of its own.
inline uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Not by __builtin_cpu_supports, which answers no in binaries that zig's clang makes.
inline Level detect_level() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) {
    return PLAIN;
  }
  const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const uint32_t first = fma | osxsave | avx | f16c;
  if ((c & first) != first || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return PLAIN;
  }
  const uint64_t saved = saved_registers();
  const uint32_t avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  if ((saved & 0x6) != 0x6 || !(b & avx2)) {
    return PLAIN;
  }
  const uint32_t second = f | dq | bw | vl;
  return (saved & 0xe6) == 0xe6 && (b & second) == second ? AVX512 : AVX2;
}

#else

inline Level detect_level() {
  return PLAIN;
}

#endif

} // namespace kernelhub
