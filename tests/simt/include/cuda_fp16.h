// float16 as CUDA's header of this name; the CPU's own conversions.
#pragma once

struct __half {
  _Float16 value = 0;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return float(value.value); }
inline __half2 __floats2half2_rn(float a, float b) { return {{_Float16(a)}, {_Float16(b)}}; }
