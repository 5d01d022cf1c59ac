// Vectors of W numbers and the functions of them that networks need: for the messages of training beside this file
// and for the native path of dynamics.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FF_BYTES 64
#elif defined(__AVX__)
#define FF_BYTES 32
#else
#define FF_BYTES 16
#endif

namespace ff {

template <class T, int W> struct Lanes {
  typedef T V __attribute__((vector_size(W * sizeof(T))));
};

template <class T, int W> inline typename Lanes<T, W>::V load(const T* p) {
  typename Lanes<T, W>::V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Sum of the lanes, by halves.
template <class T, int W> struct Sum {
  static T of(const typename Lanes<T, W>::V& v) {
    typename Lanes<T, W / 2>::V a, b;
    std::memcpy(&a, &v, sizeof(a));
    std::memcpy(&b, reinterpret_cast<const char*>(&v) + sizeof(a), sizeof(b));
    return Sum<T, W / 2>::of(a + b);
  }
};
template <class T> struct Sum<T, 1> {
  static T of(const typename Lanes<T, 1>::V& v) { return v[0]; }
};

template <class T> struct ExpBits;
template <> struct ExpBits<float> {
  using I = int32_t;
  static constexpr float magic = 12582912.0f, low = -87.0f, high = 88.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
};
template <> struct ExpBits<double> {
  using I = int64_t;
  static constexpr double magic = 6755399441055744.0, low = -708.0, high = 709.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
};

// exp by range reduction and a Taylor polynomial: rounding error of a few units in the last place.
template <class T, class V> inline V exp_of(V x) {
  using B = ExpBits<T>;
  typedef typename B::I Ints __attribute__((vector_size(sizeof(V))));
  const V low = B::low - V{}, high = B::high - V{};
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V shifted = x * T(1.4426950408889634) + B::magic;
  const V n = shifted - B::magic;
  const V r = (x - n * B::ln2_high) - n * B::ln2_low;
  static constexpr double inverse[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
      1.0 / 6227020800.0};
  V p = T(inverse[B::terms]) - V{};
#pragma GCC unroll 16
  for (int i = B::terms - 1; i >= 0; --i) p = p * r + T(inverse[i]);
  // the low bits of `shifted` hold n as an integer
  const V base = B::magic - V{};
  Ints from, zero;
  std::memcpy(&from, &shifted, sizeof(V));
  std::memcpy(&zero, &base, sizeof(V));
  const Ints bits = (from - zero + B::bias) << B::mantissa;
  V power;
  std::memcpy(&power, &bits, sizeof(V));
  return p * power;
}

// silu, its slope and its curvature, from x and its sigmoid.
template <class X> inline X silu_slope(X x, X s) { return s * (1 + x * (1 - s)); }
template <class X> inline X silu_curvature(X x, X s) { return s * (1 - s) * (2 + x * (1 - 2 * s)); }

}  // namespace ff
