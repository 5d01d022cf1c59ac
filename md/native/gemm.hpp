// Products of a row-major matrix with a fixed one, whose columns are packed once into panels that fit a cache.
#pragma once
#include <algorithm>

#include "simd.hpp"

namespace ff {

constexpr int64_t kRows = 6, kDepth = 256;

template <class T> class Packed {
 public:
  Packed() = default;
  // The matrix is [k, n]; `transposed` says that it is given as [n, k].
  Packed(const T* matrix, int64_t k, int64_t n, bool transposed) : k_(k), n_(n) {
    constexpr int64_t wide = FF_PANEL * width<T>;
    panels_ = (n + wide - 1) / wide;
    data_.assign(panels_ * k * wide, T(0));
    for (int64_t p = 0; p < panels_; ++p)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < std::min(wide, n - p * wide); ++j) {
          const int64_t column = p * wide + j;
          data_[(p * k + i) * wide + j] = transposed ? matrix[column * k + i] : matrix[i * n + column];
        }
  }

  // c[m, n] = a[m, k] * matrix (+ bias), or c += where `accumulate`.
  void times(int64_t m, const T* a, int64_t lda, T* c, int64_t ldc, const T* bias, bool accumulate) const {
    for (int64_t p = 0; p < panels_; ++p)
      for (int64_t start = 0; start < k_; start += kDepth) {
        const int64_t depth = std::min(kDepth, k_ - start);
        const T* offset = start == 0 && bias ? bias + p * FF_PANEL * width<T> : nullptr;
        int64_t row = 0;
        for (; row + kRows <= m; row += kRows)
          tile<kRows>(p, start, depth, a + row * lda, lda, c + row * ldc, ldc, offset, accumulate || start);
        // what is left in one tile as well: single rows wait for their own sums most of the time
        const T* rest = a + row * lda;
        T* out = c + row * ldc;
        const bool more = accumulate || start;
        switch (m - row) {
          case 5: tile<5>(p, start, depth, rest, lda, out, ldc, offset, more); break;
          case 4: tile<4>(p, start, depth, rest, lda, out, ldc, offset, more); break;
          case 3: tile<3>(p, start, depth, rest, lda, out, ldc, offset, more); break;
          case 2: tile<2>(p, start, depth, rest, lda, out, ldc, offset, more); break;
          case 1: tile<1>(p, start, depth, rest, lda, out, ldc, offset, more); break;
        }
      }
  }

  int64_t rows() const { return k_; }
  int64_t columns() const { return n_; }

 private:
  template <int R>
  void tile(int64_t p, int64_t start, int64_t depth, const T* a, int64_t lda, T* c, int64_t ldc, const T* bias,
            bool accumulate) const {
    constexpr int64_t wide = FF_PANEL * width<T>;
    V<T> sum[R][FF_PANEL] = {};
    const T* b = data_.data() + (p * k_ + start) * wide;
    for (int64_t i = 0; i < depth; ++i, b += wide) {
      V<T> column[FF_PANEL];
#pragma GCC unroll 8
      for (int j = 0; j < FF_PANEL; ++j) column[j] = load(b + j * width<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T value = a[r * lda + start + i];
#pragma GCC unroll 8
        for (int j = 0; j < FF_PANEL; ++j) sum[r][j] += value * column[j];
      }
    }
    const int64_t first = p * wide, valid = std::min(wide, n_ - first);
    for (int r = 0; r < R; ++r) {
      T* out = c + r * ldc + first;
      if (valid == wide) {
        for (int j = 0; j < FF_PANEL; ++j) {
          V<T> v = sum[r][j];
          if (bias) v += load(bias + j * width<T>);
          if (accumulate) v += load(out + j * width<T>);
          store<T>(out + j * width<T>, v);
        }
      } else {
        T values[wide];
        for (int j = 0; j < FF_PANEL; ++j) store<T>(values + j * width<T>, sum[r][j]);
        for (int64_t j = 0; j < valid; ++j)
          out[j] = values[j] + (bias ? bias[j] : T(0)) + (accumulate ? out[j] : T(0));
      }
    }
  }

  int64_t k_ = 0, n_ = 0, panels_ = 0;
  std::vector<T> data_;
};

// A linear map of the network with what its derivative needs: y = x W^T + b, dx = dy W.
template <class T> struct Linear {
  Packed<T> forward, backward;
  std::vector<T> bias;

  // Reads W [out, in] and, where there is one, b [out] from `source` and moves it on.
  void read(const T*& source, int64_t in, int64_t out, bool has_bias) {
    forward = Packed<T>(source, in, out, true);
    backward = Packed<T>(source, out, in, false);
    source += in * out;
    if (has_bias) {
      bias.assign(source, source + out);
      source += out;
    }
  }
  void apply(int64_t m, const T* x, T* y) const {
    forward.times(m, x, forward.rows(), y, forward.columns(), bias.empty() ? nullptr : bias.data(), false);
  }
  void pull(int64_t m, const T* dy, T* dx, bool accumulate = false) const {
    backward.times(m, dy, backward.rows(), dx, backward.columns(), nullptr, accumulate);
  }
};

}  // namespace ff
