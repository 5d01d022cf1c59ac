// Messages of the equivariant transformer's attention.
#pragma once
#include "message_data.hpp"

namespace ff {

enum Row { kQuery, kKey, kScalar, kDirection, kVector };  // what `mixed` holds of each atom, blocks of f numbers

template <class T, int W, bool Tangent, bool Sums, bool Gradient> class AttentionMessages {
  using N = Numbers<T, W, Tangent>;
  using V = typename N::V;
  using S = typename N::Wide;    // over W channels
  using One = typename N::One;   // of a pair or a head

 public:
  explicit AttentionMessages(const MessageData<T>& data) : m(data), per_head(m.f / m.heads), chunks(per_head / W) {}

  void run(int64_t first, int64_t last) const {
    for (int64_t p = 0; p < m.pairs; ++p) pair(p, m.a[p], m.b[p], first, last, false);
    // an atom and itself: one row of filters for all, one direction, and no vector between them
    if (m.selves)
      for (int64_t i = 0; i < m.n; ++i) pair(m.pairs, i, i, first, last, true);
  }

 private:
  static constexpr int kMost = 64;
  struct Filter {
    S value, slope, gradient;
  };
  struct Geometry {
    One weight, u[3];
  };

  void pair(int64_t row, int64_t a, int64_t b, int64_t first, int64_t last, bool self) const {
    Geometry geometry;
    geometry.weight = N::one(m.weight, m.d_weight, row);
    for (int c = 0; c < 3; ++c) geometry.u[c] = N::one(m.direction, m.d_direction, 3 * row + c);
    S weight{}, u[3] = {};
    for (int64_t h = first; h < last; ++h) {
      const int kinds = m.vectors ? 4 : 3;
      Filter filters[4][kMost];
      for (int kind = 0; kind < kinds; ++kind)
        for (int64_t j = 0; j < chunks; ++j) {
          Filter& one = filters[kind][j];
          const int64_t at = row * kinds * m.f + kind * m.f + h * per_head + j * W;
          one.value = Silu<T, W>::of(N::wide(m.pre, m.d_pre, at), one.slope);
          one.gradient = S{};
        }
      side(a, b, T(1), h, geometry, filters, self, weight, u);
      if (!self) side(b, a, T(-1), h, geometry, filters, false, weight, u);
      if (!Gradient) continue;
      for (int kind = 0; kind < kinds; ++kind)
        for (int64_t j = 0; j < chunks; ++j) {
          const Filter& one = filters[kind][j];
          T* at = m.g_pre + row * kinds * m.f + kind * m.f + h * per_head + j * W;
          if (self) N::add(at, one.gradient * one.slope);
          else N::put(at, one.gradient * one.slope);
        }
    }
    if (!Gradient) return;
    N::add_one(m.g_geometry + 4 * row, N::total(weight));
    for (int c = 0; c < 3; ++c) N::add_one(m.g_geometry + 4 * row + 1 + c, N::total(u[c]) * geometry.weight);
  }

  // What centre `c` gets from neighbour `n`.
  void side(int64_t c, int64_t n, T sign, int64_t h, const Geometry& geometry, Filter (*filters)[kMost], bool self,
            S& g_weight, S* g_u) const {
    const int64_t blocks = m.vectors ? 5 : 4, offset = h * per_head;
    const int64_t at_c = c * blocks * m.f + offset, at_n = n * blocks * m.f + offset;
    const One& w = geometry.weight;
    S sum{};
    for (int64_t j = 0; j < chunks; ++j)
      sum = sum + atom(at_c, kQuery, j) * atom(at_n, kKey, j) * filters[kQuery][j].value;
    One slope;
    const One gate = Silu<T, W>::of_one(N::total(sum), slope);
    if (Sums) sums(c, n, at_n, offset, sign, gate, geometry, filters, self);
    if (!Gradient) return;

    S along{};
    for (int64_t j = 0; j < chunks; ++j) {
      const V g = load<T, W>(m.gx + c * m.f + offset + j * W);
      along = along + atom(at_n, kScalar, j) * filters[1][j].value * g;
    }
    const One g_logit = N::total(along) * w * slope;
    for (int64_t j = 0; j < chunks; ++j) {
      const S query = atom(at_c, kQuery, j), key = atom(at_n, kKey, j), x = atom(at_n, kScalar, j);
      Filter &k = filters[0][j], &fx = filters[1][j], &fd = filters[2][j];
      N::add(m.g_mixed + at_c + kQuery * m.f + j * W, key * k.value * g_logit);
      N::add(m.g_mixed + at_n + kKey * m.f + j * W, query * k.value * g_logit);
      k.gradient = k.gradient + query * key * g_logit;

      const S gated = gate * load<T, W>(m.gx + c * m.f + offset + j * W);
      const S weighted = gated * w;
      N::add(m.g_mixed + at_n + kScalar * m.f + j * W, weighted * fx.value);
      fx.gradient = fx.gradient + weighted * x;
      g_weight = g_weight + gated * x * fx.value;

      V g[3];
      for (int i = 0; i < 3; ++i) g[i] = load<T, W>(m.gd + (3 * c + i) * m.f + offset + j * W);
      if (!self) {
        const S d = atom(at_n, kDirection, j);
        const S onto = (geometry.u[0] * g[0] + geometry.u[1] * g[1] + geometry.u[2] * g[2]) * sign;
        const S onto_w = onto * w, sent = d * fd.value;
        N::add(m.g_mixed + at_n + kDirection * m.f + j * W, onto_w * fd.value);
        fd.gradient = fd.gradient + onto_w * d;
        g_weight = g_weight + onto * sent;
        for (int i = 0; i < 3; ++i) g_u[i] = g_u[i] + sent * (g[i] * sign);
      }
      if (!m.vectors) continue;

      Filter& fv = filters[3][j];
      const S v = atom(at_n, kVector, j), sent = v * fv.value * w;
      S onto{};
      for (int i = 0; i < 3; ++i) {
        const int64_t at = (3 * n + i) * m.f + offset + j * W;
        onto = onto + N::wide(m.vec, m.d_vec, at) * g[i];
        N::add(m.g_vec + at, sent * g[i]);
      }
      const S onto_w = onto * w;
      N::add(m.g_mixed + at_n + kVector * m.f + j * W, onto_w * fv.value);
      fv.gradient = fv.gradient + onto_w * v;
      g_weight = g_weight + onto * v * fv.value;
    }
  }

  void sums(int64_t c, int64_t n, int64_t at_n, int64_t offset, T sign, const One& gate, const Geometry& geometry,
            Filter (*filters)[kMost], bool self) const {
    const One w = geometry.weight, weighted = gate * w;
    for (int64_t j = 0; j < chunks; ++j) {
      N::add(m.x + c * m.f + offset + j * W, atom(at_n, kScalar, j) * filters[1][j].value * weighted);
      S vector{}, direction{};
      if (!self) direction = atom(at_n, kDirection, j) * filters[2][j].value * w * sign;
      if (m.vectors) vector = atom(at_n, kVector, j) * filters[3][j].value * w;
      for (int i = 0; i < 3; ++i) {
        S sent = direction * geometry.u[i];
        if (m.vectors) sent = sent + vector * N::wide(m.vec, m.d_vec, (3 * n + i) * m.f + offset + j * W);
        N::add(m.d + (3 * c + i) * m.f + offset + j * W, sent);
      }
    }
  }

  S atom(int64_t at, int block, int64_t j) const { return N::wide(m.mixed, m.d_mixed, at + block * m.f + j * W); }

  MessageData<T> m;
  int64_t per_head, chunks;
};

}  // namespace ff
