// Vectors of the machine's own width, and the functions of them that a network needs.
#pragma once
#include <vector>

#include "lanes.hpp"

#if defined(__AVX512F__)
#define FF_PANEL 4
#else
#define FF_PANEL 2
#endif

namespace ff {

template <class T> constexpr int width = FF_BYTES / sizeof(T);
template <class T> using V = typename Lanes<T, width<T>>::V;

template <class T> inline V<T> load(const T* p) { return load<T, width<T>>(p); }
template <class T> inline void store(T* p, V<T> v) { std::memcpy(p, &v, FF_BYTES); }
template <class T> inline V<T> spread(T value) { return value - V<T>{}; }
template <class T> inline void add(T* p, V<T> v) { store<T>(p, load(p) + v); }
template <class T> inline T total(V<T> v) { return Sum<T, width<T>>::of(v); }
template <class T> inline V<T> sigmoid(V<T> x) { return T(1) / (T(1) + exp_of<T>(-x)); }

// silu of n values (n a multiple of the width), and where `slope` is not null its derivative.
template <class T> inline void silu(const T* x, T* y, T* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += width<T>) {
    const V<T> v = load(x + i), s = sigmoid<T>(v);
    if (slope) store<T>(slope + i, silu_slope(v, s));
    store<T>(y + i, v * s);
  }
}

}  // namespace ff
