// Vectors of W numbers, plain or with a tangent, and how messages read, write and add them.
#pragma once
#include <type_traits>

#include "lanes.hpp"

namespace ff {

// A value and its derivative along one direction.
template <class X> struct Dual {
  X v, d;
};
template <class X> struct is_dual : std::false_type {};
template <class X> struct is_dual<Dual<X>> : std::true_type {};
template <class X> using plain = std::enable_if_t<!is_dual<X>::value>;

template <class A, class B> inline auto operator*(const Dual<A>& a, const Dual<B>& b) {
  return Dual<decltype(a.v * b.v)>{a.v * b.v, a.d * b.v + a.v * b.d};
}
template <class A, class B, class = plain<B>> inline auto operator*(const Dual<A>& a, const B& b) {
  return Dual<decltype(a.v * b)>{a.v * b, a.d * b};
}
template <class A> inline Dual<A> operator+(const Dual<A>& a, const Dual<A>& b) { return {a.v + b.v, a.d + b.d}; }

// W channels of type T: how they are read, written and added up, with or without a tangent.
template <class T, int W, bool Tangent> struct Numbers {
  using V = typename Lanes<T, W>::V;
  using Wide = std::conditional_t<Tangent, Dual<V>, V>;
  using One = std::conditional_t<Tangent, Dual<T>, T>;

  static Wide wide(const T* value, const T* tangent, int64_t at) {
    if constexpr (Tangent) return {load<T, W>(value + at), load<T, W>(tangent + at)};
    else return load<T, W>(value + at);
  }
  static One one(const T* value, const T* tangent, int64_t at) {
    if constexpr (Tangent) return {value[at], tangent[at]};
    else return value[at];
  }
  // Of numbers with a tangent, only that goes out.
  static void add(T* p, const Wide& x) {
    V out;
    if constexpr (Tangent) out = load<T, W>(p) + x.d;
    else out = load<T, W>(p) + x;
    std::memcpy(p, &out, sizeof(V));
  }
  static void put(T* p, const Wide& x) {
    if constexpr (Tangent) std::memcpy(p, &x.d, sizeof(V));
    else std::memcpy(p, &x, sizeof(V));
  }
  static void add_one(T* p, const One& x) {
    if constexpr (Tangent) *p += x.d;
    else *p += x;
  }
  static T lanes(const V& v) {
    return Sum<T, W>::of(v);
  }
  static One total(const Wide& x) {
    if constexpr (Tangent) return {lanes(x.v), lanes(x.d)};
    else return lanes(x);
  }
};

template <class T, int W> struct Silu {
  using V = typename Lanes<T, W>::V;
  static V of(const V& x, V& slope) {
    const V s = 1 / (1 + exp_of<T>(-x));
    slope = silu_slope(x, s);
    return x * s;
  }
  static Dual<V> of(const Dual<V>& x, Dual<V>& slope) {
    const V s = 1 / (1 + exp_of<T>(-x.v)), first = silu_slope(x.v, s);
    slope = {first, silu_curvature(x.v, s) * x.d};
    return {x.v * s, first * x.d};
  }
  static T of_one(const T& x, T& slope) {
    const T s = 1 / (1 + std::exp(-x));
    slope = silu_slope(x, s);
    return x * s;
  }
  static Dual<T> of_one(const Dual<T>& x, Dual<T>& slope) {
    const T s = 1 / (1 + std::exp(-x.v)), first = silu_slope(x.v, s);
    slope = {first, silu_curvature(x.v, s) * x.d};
    return {x.v * s, first * x.d};
  }
};

}  // namespace ff
