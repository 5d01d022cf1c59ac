// Pairs of a structure: distances, cutoff function and radial basis with their slopes.
#pragma once
#include "simd.hpp"

namespace ff {

// Structures as the caller holds them. A pair is listed once: from atom `a` to atom `b` plus a translation.
struct Structure {
  int64_t n_atoms, n_pairs;
  const int64_t *z, *a, *b;
  const double *pos, *shift;  // [n_atoms, 3]; [n_pairs, 3] or null
};

// Pairs whose filters are computed together, so that they stay in the cache.
constexpr int64_t kChunk = 48;
// Filters of all layers are kept from the forward to the backward pass up to this size, else computed again.
constexpr int64_t kKeptBytes = int64_t(1) << 26;

// What the pairs gather from the end of the network on, over all layers.
template <class T> struct PairGradient {
  std::vector<T> basis, weight, direction;
  void clear(int64_t n, int64_t k) {
    basis.assign(n * k, T(0)), weight.assign(n, T(0)), direction.assign(3 * n, T(0));
  }
};

template <class T> struct Pairs {
  std::vector<int64_t> a, b;
  std::vector<T> distance, direction, weight, weight_slope, basis, basis_slope;
  std::vector<double> vector;
  double shortest = INFINITY;

  int64_t size() const { return static_cast<int64_t>(a.size()); }

  // Keeps the pairs closer than the cutoff.
  void find(const Structure& s, double cutoff) {
    a.clear(), b.clear(), vector.clear();
    double nearest = INFINITY;
    for (int64_t p = 0; p < s.n_pairs; ++p) {
      double v[3], square = 0;
      for (int c = 0; c < 3; ++c) {
        v[c] = s.pos[3 * s.b[p] + c] - s.pos[3 * s.a[p] + c] + (s.shift ? s.shift[3 * p + c] : 0.0);
        square += v[c] * v[c];
      }
      nearest = std::min(nearest, square);
      if (!(square < cutoff * cutoff)) continue;
      a.push_back(s.a[p]), b.push_back(s.b[p]);
      vector.insert(vector.end(), v, v + 3);
    }
    shortest = std::sqrt(nearest);
  }

  // Distances and directions in T, and the cutoff function (cos(pi d / cutoff) + 1) / 2.
  void measure(double cutoff) {
    const int64_t n = size();
    distance.resize(n), direction.resize(3 * n), weight.resize(n), weight_slope.resize(n);
    const T turn = T(M_PI / cutoff);
    for (int64_t p = 0; p < n; ++p) {
      T v[3], square = 0;
      for (int c = 0; c < 3; ++c) v[c] = static_cast<T>(vector[3 * p + c]), square += v[c] * v[c];
      const T d = std::sqrt(square);
      distance[p] = d;
      for (int c = 0; c < 3; ++c) direction[3 * p + c] = v[c] / d;
      const bool inside = d < T(cutoff);
      weight[p] = inside ? T(0.5) * (std::cos(d * turn) + T(1)) : T(0);
      weight_slope[p] = inside ? T(-0.5) * turn * std::sin(d * turn) : T(0);
    }
  }

  // Exponential-normal basis: weight * exp(-beta (exp(-alpha d) - mean)^2), and its slope where it is wanted.
  void exponential_normal(double cutoff, const std::vector<T>& means, const std::vector<T>& betas, bool slopes) {
    const int64_t n = size(), k = static_cast<int64_t>(means.size());
    const T alpha = T(5.0 / cutoff);
    std::vector<T> near(n), arguments(n * k + width<T>);
    for (int64_t p = 0; p < n; ++p) {
      near[p] = std::exp(-alpha * distance[p]);
      for (int64_t i = 0; i < k; ++i) {
        const T off = near[p] - means[i];
        arguments[p * k + i] = betas[i] * off * off;
      }
    }
    bumps(arguments, k);
    for (int64_t p = 0; p < n; ++p)
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = p * k + i;
        const T bump = basis[at];
        basis[at] = weight[p] * bump;
        if (!slopes) continue;
        const T slope = T(2) * betas[i] * (near[p] - means[i]) * alpha * near[p];
        basis_slope[at] = weight_slope[p] * bump + weight[p] * slope * bump;
      }
  }

  // Gaussian basis: exp(-((d - centre) / width)^2 / 2), and its slope where it is wanted.
  void gaussian(const std::vector<T>& centers, const std::vector<T>& widths, bool slopes) {
    const int64_t n = size(), k = static_cast<int64_t>(centers.size());
    std::vector<T> arguments(n * k + width<T>);
    for (int64_t p = 0; p < n; ++p)
      for (int64_t i = 0; i < k; ++i) {
        const T off = (distance[p] - centers[i]) / widths[i];
        arguments[p * k + i] = T(0.5) * off * off;
      }
    bumps(arguments, k);
    for (int64_t p = 0; slopes && p < n; ++p)
      for (int64_t i = 0; i < k; ++i) {
        const T off = (distance[p] - centers[i]) / widths[i];
        basis_slope[p * k + i] = -off / widths[i] * basis[p * k + i];
      }
  }

  // Adds dE/dx to `gradient` [n_atoms, 3] and sum over pairs of vector (x) dE/dvector to `virial` [3, 3].
  void pull(const PairGradient<T>& of, int64_t k, double* gradient, double* virial) const {
    for (int64_t p = 0; p < size(); ++p) {
      T along = of.weight[p] * weight_slope[p], radial = 0;
      for (int64_t i = 0; i < k; ++i) along += of.basis[p * k + i] * basis_slope[p * k + i];
      const T *u = &direction[3 * p], *g = &of.direction[3 * p];
      for (int c = 0; c < 3; ++c) radial += u[c] * g[c];
      for (int c = 0; c < 3; ++c) {
        const double slope = along * u[c] + (g[c] - u[c] * radial) / distance[p];
        gradient[3 * b[p] + c] += slope;
        gradient[3 * a[p] + c] -= slope;
        for (int d = 0; d < 3; ++d) virial[3 * d + c] += vector[3 * p + d] * slope;
      }
    }
  }

 private:
  // basis = exp(-arguments), with the tails that radial.py puts to zero.
  void bumps(const std::vector<T>& arguments, int64_t k) {
    const int64_t n = size() * k;
    basis.resize(n + width<T>), basis_slope.resize(n);
    for (int64_t i = 0; i < n; i += width<T>) store<T>(&basis[i], exp_of<T>(-load(&arguments[i])));
    for (int64_t i = 0; i < n; ++i) basis[i] = arguments[i] < T(40) ? basis[i] : T(0);
  }
};

}  // namespace ff
