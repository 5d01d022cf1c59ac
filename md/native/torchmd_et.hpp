// The equivariant transformer with its energy head: atomic energies, their gradient and the virial.
#pragma once
#include "attention.hpp"
#include "network.hpp"

namespace ff {

template <class T> class TorchMDET : public Network {
 public:
  // `weights` in the order of ffpretrain/md/native/weights.py; throws where their number does not fit.
  TorchMDET(const Sizes& sizes, const T* weights, int64_t count) : s_(sizes), layers_(sizes.layers) {
    const T* at = weights;
    const int64_t f = s_.hidden, k = s_.rbf;
    take(at, means_, k), take(at, betas_, k);
    take(at, embedding_, s_.max_z * f), take(at, neighbor_, s_.max_z * f);
    filter_.read(at, k, f, true);
    combine_.read(at, 2 * f, f, true);
    for (int64_t i = 0; i < s_.layers; ++i) layers_[i].read(at, f, s_.heads, k, i == 0);
    norm_.read(at, f);
    head_.read(at, f);
    if (at - weights != count) throw 1;
    std::vector<T> basis(k);
    for (int64_t i = 0; i < k; ++i) {
      const T exponent = betas_[i] * (T(1) - means_[i]) * (T(1) - means_[i]);
      basis[i] = exponent < T(40) ? std::exp(-exponent) : T(0);
    }
    for (auto& layer : layers_) {
      layer.self_filter.resize(layer.widths());
      layer.filters.apply(1, basis.data(), layer.self_filter.data());
      silu<T>(layer.self_filter.data(), layer.self_filter.data(), static_cast<T*>(nullptr), layer.widths());
    }
  }

  double energies(const Structure& s, double* energies) override {
    find(s, false);
    std::vector<T> normal(s.n_atoms * s_.hidden), inverse(s.n_atoms);
    forward(s, false, normal, inverse, energies);
    return pairs_.shortest;
  }

  double evaluate(const Structure& s, double* energies, double* gradient, double* virial) override {
    const int64_t n = s.n_atoms, f = s_.hidden, k = s_.rbf;
    std::fill(gradient, gradient + 3 * n, 0.0), std::fill(virial, virial + 9, 0.0);
    find(s, true);
    const bool keep = pairs_.size() * s_.layers * 4 * f * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
    std::vector<T> normal(n * f), inverse(n);
    forward(s, keep, normal, inverse, energies);

    std::vector<T> gnormed(n * f), gx(n * f, T(0)), gvec(n * 3 * f);
    head_.pull(n, gnormed.data(), gvec.data());
    norm_.pull(n, gnormed.data(), gx.data(), normal.data(), inverse.data());
    slopes_.clear(pairs_.size(), k);
    for (int64_t i = s_.layers - 1; i >= 0; --i) layers_[i].backward(n, pairs_, k, gx.data(), gvec, slopes_);
    embed_backward(s, gx.data());
    pairs_.pull(slopes_, k, gradient, virial);
    return pairs_.shortest;
  }

 private:
  void find(const Structure& s, bool slopes) {
    pairs_.find(s, s_.cutoff);
    pairs_.measure(s_.cutoff);
    pairs_.exponential_normal(s_.cutoff, means_, betas_, slopes);
  }

  // `keep`: the filters of all layers, for a backward pass to come.
  void forward(const Structure& s, bool keep, std::vector<T>& normal, std::vector<T>& inverse, double* energies) {
    const int64_t n = s.n_atoms, f = s_.hidden;
    std::vector<T> x(n * f), vec, normed(n * f);
    embed(s, x.data());
    for (auto& layer : layers_) layer.forward(n, pairs_, s_.rbf, x.data(), vec, keep);
    norm_.apply(n, x.data(), normed.data(), normal.data(), inverse.data());
    head_.apply(n, normed.data(), vec.data(), energies);
  }

  // x = combine([embedding(z), sum over neighbours of filter * weight * neighbour embedding])
  void embed(const Structure& s, T* x) {
    const int64_t n = s.n_atoms, f = s_.hidden, k = s_.rbf;
    std::vector<T> joined(n * 2 * f, T(0));
    filtered_.resize(kChunk * f);
    for (int64_t i = 0; i < n; ++i) std::copy_n(&embedding_[s.z[i] * f], f, &joined[2 * i * f]);
    for (int64_t start = 0; start < pairs_.size(); start += kChunk) {
      const int64_t count = std::min(kChunk, pairs_.size() - start);
      filter_.apply(count, &pairs_.basis[start * k], filtered_.data());
      for (int64_t p = start; p < start + count; ++p) {
        const int64_t a = pairs_.a[p], b = pairs_.b[p];
        for (int64_t j = 0; j < f; j += width<T>) {
          const V<T> message = load(&filtered_[(p - start) * f + j]) * pairs_.weight[p];
          add<T>(&joined[(2 * a + 1) * f + j], message * load(&neighbor_[s.z[b] * f + j]));
          add<T>(&joined[(2 * b + 1) * f + j], message * load(&neighbor_[s.z[a] * f + j]));
        }
      }
    }
    combine_.apply(n, joined.data(), x);
  }

  void embed_backward(const Structure& s, const T* gx) {
    const int64_t n = s.n_atoms, f = s_.hidden, k = s_.rbf;
    std::vector<T> joined(n * 2 * f), gfilter(kChunk * f);
    combine_.pull(n, gx, joined.data());
    for (int64_t start = 0; start < pairs_.size(); start += kChunk) {
      const int64_t count = std::min(kChunk, pairs_.size() - start);
      filter_.apply(count, &pairs_.basis[start * k], filtered_.data());
      for (int64_t p = start; p < start + count; ++p) {
        const int64_t a = pairs_.a[p], b = pairs_.b[p];
        V<T> gw{};
        for (int64_t j = 0; j < f; j += width<T>) {
          const V<T> both = load(&joined[(2 * a + 1) * f + j]) * load(&neighbor_[s.z[b] * f + j]) +
                            load(&joined[(2 * b + 1) * f + j]) * load(&neighbor_[s.z[a] * f + j]);
          gw += both * load(&filtered_[(p - start) * f + j]);
          store<T>(&gfilter[(p - start) * f + j], both * pairs_.weight[p]);
        }
        slopes_.weight[p] += total<T>(gw);
      }
      filter_.pull(count, gfilter.data(), &slopes_.basis[start * k], true);
    }
  }

  Sizes s_;
  std::vector<T> means_, betas_, embedding_, neighbor_, filtered_;
  Linear<T> filter_, combine_;
  std::vector<Attention<T>> layers_;
  LayerNorm<T> norm_;
  EnergyHead<T> head_;
  Pairs<T> pairs_;
  PairGradient<T> slopes_;
};

}  // namespace ff
