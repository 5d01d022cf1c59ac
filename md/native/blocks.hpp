// Layer norm and the gated blocks of the energy head, forward and backward.
#pragma once
#include "gemm.hpp"

namespace ff {

template <class T> struct LayerNorm {
  std::vector<T> weight, bias;

  void read(const T*& source, int64_t f) {
    weight.assign(source, source + f), bias.assign(source + f, source + 2 * f);
    source += 2 * f;
  }
  // y = weight * normal + bias; keeps the normalised rows and their inverse deviation for `pull`.
  void apply(int64_t n, const T* x, T* y, T* normal, T* inverse) const {
    const int64_t f = static_cast<int64_t>(weight.size());
    for (int64_t i = 0; i < n; ++i, x += f, y += f, normal += f) {
      V<T> sum{}, square{};
      for (int64_t j = 0; j < f; j += width<T>) sum += load(x + j);
      const T mean = total<T>(sum) / f;
      for (int64_t j = 0; j < f; j += width<T>) {
        const V<T> off = load(x + j) - mean;
        square += off * off;
      }
      inverse[i] = T(1) / std::sqrt(total<T>(square) / f + T(1e-5));
      for (int64_t j = 0; j < f; j += width<T>) {
        const V<T> v = (load(x + j) - mean) * inverse[i];
        store<T>(normal + j, v);
        store<T>(y + j, v * load(&weight[j]) + load(&bias[j]));
      }
    }
  }
  // dx += the derivative.
  void pull(int64_t n, const T* dy, T* dx, const T* normal, const T* inverse) const {
    const int64_t f = static_cast<int64_t>(weight.size());
    for (int64_t i = 0; i < n; ++i, dy += f, dx += f, normal += f) {
      V<T> sum{}, product{};
      for (int64_t j = 0; j < f; j += width<T>) {
        const V<T> g = load(dy + j) * load(&weight[j]);
        sum += g, product += g * load(normal + j);
      }
      const T mean = total<T>(sum) / f, along = total<T>(product) / f;
      for (int64_t j = 0; j < f; j += width<T>)
        add<T>(dx + j, inverse[i] * (load(dy + j) * load(&weight[j]) - mean - load(normal + j) * along));
    }
  }
};

// Gated equivariant block: scalars [n, in] and vectors [n, 3, in] to [n, out] and [n, 3, out], or to scalars only.
template <class T> struct Gated {
  Linear<T> norm_proj, vec_proj, hidden, last;
  int64_t in = 0, out = 0;
  bool vectors = false;
  std::vector<T> projected, norm_slope, joined, hidden_raw, hidden_slope, raw, slope, moved, scratch, scratch_vec;

  void read(const T*& source, int64_t n_in, int64_t n_out, bool with_vectors) {
    in = n_in, out = n_out, vectors = with_vectors;
    norm_proj.read(source, in, in, false);
    if (vectors) vec_proj.read(source, in, out, false);
    hidden.read(source, 2 * in, in, true);
    last.read(source, in, vectors ? 2 * out : out, true);
  }
  void apply(int64_t n, const T* x, const T* vec, T* y, T* y_vec, T smooth) {
    const int64_t rows = last.forward.columns();
    projected.resize(n * 3 * in), norm_slope.resize(n * in), joined.resize(n * 2 * in), hidden_raw.resize(n * in);
    hidden_slope.resize(n * in), raw.resize(n * rows), slope.resize(n * out), moved.resize(n * 3 * out);
    norm_proj.apply(3 * n, vec, projected.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < in; j += width<T>) {
        V<T> square{};
        for (int c = 0; c < 3; ++c) {
          const V<T> v = load(&projected[(3 * i + c) * in + j]);
          square += v * v;
        }
        store<T>(&joined[2 * i * in + j], load(x + i * in + j));
        for (int l = 0; l < width<T>; ++l) {
          // a length that is smooth at zero, as the heads of the eager path have it, and its derivative with
          // respect to a component over that component
          T &length = joined[(2 * i + 1) * in + j + l], &ratio = norm_slope[i * in + j + l];
          if (sizeof(T) == 8) {
            const T u = square[l] / smooth, t = u * u + 1, root = 1 / std::sqrt(smooth * std::sqrt(t));
            length = square[l] * root, ratio = (u * u + 2) / t * root;
          } else {
            length = std::sqrt(square[l] + smooth), ratio = 1 / length;
          }
        }
      }
    hidden.apply(n, joined.data(), hidden_raw.data());
    silu<T>(hidden_raw.data(), hidden_raw.data(), hidden_slope.data(), n * in);
    last.apply(n, hidden_raw.data(), raw.data());
    if (!vectors) {
      std::copy(raw.begin(), raw.begin() + n * out, y);
      return;
    }
    vec_proj.apply(3 * n, vec, moved.data());
    for (int64_t i = 0; i < n; ++i) {
      silu<T>(&raw[2 * i * out], y + i * out, &slope[i * out], out);
      for (int c = 0; c < 3; ++c)
        for (int64_t j = 0; j < out; j += width<T>)
          store<T>(y_vec + (3 * i + c) * out + j,
                   load(&raw[(2 * i + 1) * out + j]) * load(&moved[(3 * i + c) * out + j]));
    }
  }
  // From dy [n, out], dy_vec [n, 3, out] to dx [n, in], dvec [n, 3, in].
  void pull(int64_t n, const T* dy, const T* dy_vec, T* dx, T* dvec) {
    const int64_t rows = last.forward.columns();
    std::vector<T> draw(n * rows), dmoved(vectors ? n * 3 * out : 0), dhidden(n * in), djoined(2 * n * in);
    if (vectors) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < out; j += width<T>) {
          store<T>(&draw[2 * i * out + j], load(dy + i * out + j) * load(&slope[i * out + j]));
          V<T> gate{};
          for (int c = 0; c < 3; ++c) {
            const int64_t at = (3 * i + c) * out + j;
            gate += load(dy_vec + at) * load(&moved[at]);
            store<T>(&dmoved[at], load(dy_vec + at) * load(&raw[(2 * i + 1) * out + j]));
          }
          store<T>(&draw[(2 * i + 1) * out + j], gate);
        }
    } else {
      std::copy(dy, dy + n * out, draw.begin());
    }
    last.pull(n, draw.data(), dhidden.data());
    for (int64_t i = 0; i < n * in; i += width<T>)
      store<T>(&dhidden[i], load(&dhidden[i]) * load(&hidden_slope[i]));
    hidden.pull(n, dhidden.data(), djoined.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < in; j += width<T>) {
        store<T>(dx + i * in + j, load(&djoined[2 * i * in + j]));
        const V<T> g = load(&djoined[(2 * i + 1) * in + j]) * load(&norm_slope[i * in + j]);
        for (int c = 0; c < 3; ++c) {
          T* v = &projected[(3 * i + c) * in + j];
          store<T>(v, load(v) * g);
        }
      }
    norm_proj.pull(3 * n, projected.data(), dvec);
    if (vectors) vec_proj.pull(3 * n, dmoved.data(), dvec, true);
  }
};

// Two gated blocks: from features to atomic energies.
template <class T> struct EnergyHead {
  Gated<T> first, second;
  static constexpr T smooth = sizeof(T) == 8 ? T(1e-18) : T(1e-12);

  void read(const T*& source, int64_t f) {
    first.read(source, f, f / 2, true);
    second.read(source, f / 2, 1, false);
  }
  void apply(int64_t n, const T* x, const T* vec, double* energies) {
    std::vector<T> scalars(n * first.out), vectors(n * 3 * first.out), atomic(n);
    first.apply(n, x, vec, scalars.data(), vectors.data(), smooth);
    second.apply(n, scalars.data(), vectors.data(), atomic.data(), nullptr, smooth);
    std::copy(atomic.begin(), atomic.end(), energies);
  }
  // The derivative of the sum of all energies with respect to x and vec.
  void pull(int64_t n, T* gx, T* gvec) {
    std::vector<T> ones(n, T(1)), gscalars(n * first.out), gvectors(n * 3 * first.out);
    second.pull(n, ones.data(), nullptr, gscalars.data(), gvectors.data());
    first.pull(n, gscalars.data(), gvectors.data(), gx, gvec);
  }
};

}  // namespace ff
