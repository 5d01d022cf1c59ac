// Vectors of the machine's own width, and the two functions of them that a network needs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#define FF_BYTES 64
#define FF_PANEL 4
#elif defined(__AVX__)
#define FF_BYTES 32
#define FF_PANEL 2
#else
#define FF_BYTES 16
#define FF_PANEL 2
#endif

namespace ff {

template <class T> struct Lane;
template <> struct Lane<float> {
  typedef float V __attribute__((vector_size(FF_BYTES)));
  typedef int32_t I __attribute__((vector_size(FF_BYTES)));
  static constexpr float magic = 12582912.0f, low = -87.0f, high = 88.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
};
template <> struct Lane<double> {
  typedef double V __attribute__((vector_size(FF_BYTES)));
  typedef int64_t I __attribute__((vector_size(FF_BYTES)));
  static constexpr double magic = 6755399441055744.0, low = -708.0, high = 709.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
};

template <class T> using V = typename Lane<T>::V;
template <class T> constexpr int width = FF_BYTES / sizeof(T);

template <class T> inline V<T> load(const T* p) {
  V<T> v;
  std::memcpy(&v, p, FF_BYTES);
  return v;
}
template <class T> inline void store(T* p, V<T> v) { std::memcpy(p, &v, FF_BYTES); }
template <class T> inline V<T> spread(T value) { return value - V<T>{}; }
template <class T> inline void add(T* p, V<T> v) { store<T>(p, load(p) + v); }

// Sum of the lanes, by halves.
template <class T, int N> struct Half {
  typedef T W __attribute__((vector_size(N * sizeof(T))));
  typedef T H __attribute__((vector_size(N / 2 * sizeof(T))));
  static inline T sum(W v) {
    H a, b;
    std::memcpy(&a, &v, sizeof(H));
    std::memcpy(&b, reinterpret_cast<const char*>(&v) + sizeof(H), sizeof(H));
    return Half<T, N / 2>::sum(a + b);
  }
};
template <class T> struct Half<T, 2> {
  typedef T W __attribute__((vector_size(2 * sizeof(T))));
  static inline T sum(W v) { return v[0] + v[1]; }
};
template <class T> inline T total(V<T> v) { return Half<T, width<T>>::sum(v); }

// exp by range reduction and a Taylor polynomial: rounding error of a few units in the last place.
template <class T> inline V<T> exp(V<T> x) {
  using L = Lane<T>;
  x = x < L::low ? spread<T>(L::low) : x;
  x = x > L::high ? spread<T>(L::high) : x;
  const V<T> shifted = x * T(1.4426950408889634) + L::magic;
  const V<T> n = shifted - L::magic;
  const V<T> r = (x - n * L::ln2_high) - n * L::ln2_low;
  static constexpr double inverse[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
      1.0 / 6227020800.0};
  V<T> p = spread<T>(T(inverse[L::terms]));
#pragma GCC unroll 16
  for (int i = L::terms - 1; i >= 0; --i) p = p * r + T(inverse[i]);
  // the low bits of `shifted` hold n as an integer
  typename L::I bits;
  const V<T> base = spread<T>(L::magic);
  typename L::I from, zero;
  std::memcpy(&from, &shifted, FF_BYTES);
  std::memcpy(&zero, &base, FF_BYTES);
  bits = (from - zero + L::bias) << L::mantissa;
  V<T> power;
  std::memcpy(&power, &bits, FF_BYTES);
  return p * power;
}

template <class T> inline V<T> sigmoid(V<T> x) { return T(1) / (T(1) + exp<T>(-x)); }

// silu of n values (n a multiple of the width), and where `slope` is not null its derivative.
template <class T> inline void silu(const T* x, T* y, T* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += width<T>) {
    const V<T> v = load(x + i), s = sigmoid<T>(v);
    if (slope) store<T>(slope + i, s * (T(1) + v * (T(1) - s)));
    store<T>(y + i, v * s);
  }
}

}  // namespace ff
