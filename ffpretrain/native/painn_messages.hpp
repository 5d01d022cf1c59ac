// Messages of PaiNN: each block of what a neighbour sends times its filter, and nothing between channels.
#pragma once
#include "message_data.hpp"

namespace ff {

template <class T, int W, bool Vectors, bool Tangent, bool Sums, bool Gradient> class PainnMessages {
  using N = Numbers<T, W, Tangent>;
  using V = typename N::V;
  using S = typename N::Wide;   // over W channels
  using One = typename N::One;  // of a pair

 public:
  explicit PainnMessages(const MessageData<T>& data) : m(data) {}

  // For channels first * W to last * W.
  void run(int64_t first, int64_t last) const {
    for (int64_t p = 0; p < m.pairs; ++p) pair(p, first * W, last * W);
  }

 private:
  enum Block { kScalar, kDirection, kVector };
  static constexpr int kBlocks = Vectors ? 3 : 2;
  // of one pair and W channels; `gradient` with respect to filter times weight
  struct Filters {
    S value[kBlocks], weighted[kBlocks], gradient[kBlocks];
  };

  void pair(int64_t row, int64_t first, int64_t last) const {
    const One weight = N::one(m.weight, m.d_weight, row);
    One u[3];
    for (int i = 0; i < 3; ++i) u[i] = N::one(m.direction, m.d_direction, 3 * row + i);
    S g_weight{}, g_u[3] = {};
    for (int64_t j = first; j < last; j += W) {
      const int64_t at = row * kBlocks * m.f + j;
      Filters filters{};
      for (int k = 0; k < kBlocks; ++k) {
        filters.value[k] = N::wide(m.pre, m.d_pre, at + k * m.f);
        filters.weighted[k] = filters.value[k] * weight;
      }
      side(m.a[row], m.b[row], T(1), j, u, filters, g_u);
      side(m.b[row], m.a[row], T(-1), j, u, filters, g_u);
      if (!Gradient) continue;
      for (int k = 0; k < kBlocks; ++k) {
        N::put(m.g_pre + at + k * m.f, filters.gradient[k] * weight);
        g_weight = g_weight + filters.gradient[k] * filters.value[k];
      }
    }
    if (!Gradient) return;
    N::add_one(m.g_geometry + 4 * row, N::total(g_weight));
    for (int i = 0; i < 3; ++i) N::add_one(m.g_geometry + 4 * row + 1 + i, N::total(g_u[i]));
  }

  // What centre `c` gets from neighbour `n`; `sign` turns the direction for the second of a pair.
  void side(int64_t c, int64_t n, T sign, int64_t j, const One* u, Filters& filters, S* g_u) const {
    const int64_t at_n = n * kBlocks * m.f + j, vec_c = 3 * c * m.f + j, vec_n = 3 * n * m.f + j;
    S sent[kBlocks], vec[3];
    for (int k = 0; k < kBlocks; ++k) sent[k] = N::wide(m.mixed, m.d_mixed, at_n + k * m.f);
    if constexpr (Vectors)
      for (int i = 0; i < 3; ++i) vec[i] = N::wide(m.vec, m.d_vec, vec_n + i * m.f);

    const S along = sent[kDirection] * filters.weighted[kDirection] * sign;
    S passed;
    if constexpr (Vectors) passed = sent[kVector] * filters.weighted[kVector];
    if (Sums) {
      N::add(m.x + c * m.f + j, sent[kScalar] * filters.weighted[kScalar]);
      for (int i = 0; i < 3; ++i) {
        S sum = along * u[i];
        if constexpr (Vectors) sum = sum + passed * vec[i];
        N::add(m.d + vec_c + i * m.f, sum);
      }
    }
    if (!Gradient) return;

    const V gx = load<T, W>(m.gx + c * m.f + j);
    V g[3];
    for (int i = 0; i < 3; ++i) g[i] = load<T, W>(m.gd + vec_c + i * m.f);
    // derivatives with respect to the products of what is sent and its weighted filter
    S onto[kBlocks];
    onto[kDirection] = (u[0] * g[0] + u[1] * g[1] + u[2] * g[2]) * sign;
    if constexpr (Vectors) onto[kVector] = vec[0] * g[0] + vec[1] * g[1] + vec[2] * g[2];
    for (int i = 0; i < 3; ++i) {
      g_u[i] = g_u[i] + along * g[i];
      if constexpr (Vectors) N::add(m.g_vec + vec_n + i * m.f, passed * g[i]);
    }
    N::add(m.g_mixed + at_n, filters.weighted[kScalar] * gx);
    filters.gradient[kScalar] = filters.gradient[kScalar] + sent[kScalar] * gx;
    for (int k = kDirection; k < kBlocks; ++k) {
      N::add(m.g_mixed + at_n + k * m.f, filters.weighted[k] * onto[k]);
      filters.gradient[k] = filters.gradient[k] + sent[k] * onto[k];
    }
  }

  MessageData<T> m;
};

}  // namespace ff
