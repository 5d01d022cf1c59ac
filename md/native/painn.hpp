// PaiNN with its energy head. As in attention.hpp both directions of a pair share their filters.
#pragma once
#include "blocks.hpp"
#include "network.hpp"

namespace ff {

template <class T> struct Interaction {
  Linear<T> context_in, context_out, filters, vec_proj, update_in, update_out;
  int64_t f = 0;
  bool first = false;
  T epsilon = 0;
  // kept from forward for backward
  std::vector<T> inner, inner_slope, context, vec, projected, joined, hidden, hidden_slope, update, kept, chunk;

  int64_t widths() const { return (first ? 2 : 3) * f; }

  // `filter_rows` [widths, rbf] and their bias stand apart from the other weights: one map serves all layers.
  void read(const T*& source, int64_t n, int64_t rbf, bool is_first, T eps, const T*& filter_rows,
            const T*& filter_bias) {
    f = n, first = is_first, epsilon = eps;
    context_in.read(source, f, f, true);
    context_out.read(source, f, widths(), true);
    vec_proj.read(source, f, 2 * f, false);
    update_in.read(source, 2 * f, f, true);
    update_out.read(source, f, 3 * f, true);
    filters.read(filter_rows, rbf, widths(), false);
    take(filter_bias, filters.bias, widths());
  }

  void forward(int64_t n, const Pairs<T>& pairs, int64_t k, T* x, std::vector<T>& vec_io, bool keep) {
    const int64_t p_all = pairs.size();
    inner.resize(n * f), inner_slope.resize(n * f), context.resize(n * widths()), chunk.resize(kChunk * widths());
    kept.resize(keep ? p_all * widths() : 0);
    context_in.apply(n, x, inner.data());
    silu<T>(inner.data(), inner.data(), inner_slope.data(), n * f);
    context_out.apply(n, inner.data(), context.data());
    if (!first) vec = vec_io;
    vec_io.resize(n * 3 * f);
    if (first) std::fill(vec_io.begin(), vec_io.end(), T(0));
    for (int64_t start = 0; start < p_all; start += kChunk) {
      const int64_t count = std::min(kChunk, p_all - start);
      T* filter = keep ? &kept[start * widths()] : chunk.data();
      filters.apply(count, &pairs.basis[start * k], filter);
      for (int64_t p = 0; p < count; ++p) message(pairs, start + p, filter + p * widths(), x, vec_io.data());
    }
    mix(n, x, vec_io);
  }

  // From the derivatives with respect to this layer's output to those with respect to its input, in place.
  void backward(int64_t n, const Pairs<T>& pairs, int64_t k, T* gx, std::vector<T>& gvec, PairGradient<T>& gp) {
    const int64_t p_all = pairs.size();
    mix_backward(n, gx, gvec);
    std::vector<T> gcontext(n * widths(), T(0)), gv = gvec, gfilter(kChunk * widths()), ginner(n * f);
    for (int64_t start = 0; start < p_all; start += kChunk) {
      const int64_t count = std::min(kChunk, p_all - start);
      const T* filter = kept.empty() ? chunk.data() : &kept[start * widths()];
      if (kept.empty()) filters.apply(count, &pairs.basis[start * k], chunk.data());
      for (int64_t p = 0; p < count; ++p)
        message_backward(pairs, start + p, filter + p * widths(), gx, gv.data(), gcontext.data(), gvec.data(),
                         &gfilter[p * widths()], gp);
      filters.pull(count, gfilter.data(), &gp.basis[start * k], true);
    }
    context_out.pull(n, gcontext.data(), ginner.data());
    for (int64_t i = 0; i < n * f; i += width<T>) store<T>(&ginner[i], load(&ginner[i]) * load(&inner_slope[i]));
    context_in.pull(n, ginner.data(), gx, true);
  }

 private:
  void message(const Pairs<T>& pairs, int64_t p, const T* fk, T* x, T* v) const {
    const int64_t a = pairs.a[p], b = pairs.b[p];
    const T *ca = &context[a * widths()], *cb = &context[b * widths()], *u = &pairs.direction[3 * p];
    const T w = pairs.weight[p];
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> fs = load(fk + j) * w, fd = load(fk + f + j) * w;
      add<T>(x + a * f + j, load(cb + j) * fs);
      add<T>(x + b * f + j, load(ca + j) * fs);
      const V<T> da = load(cb + f + j) * fd, db = load(ca + f + j) * fd;
      V<T> na{}, nb{};
      if (!first) {
        const V<T> fv = load(fk + 2 * f + j) * w;
        na = load(cb + 2 * f + j) * fv, nb = load(ca + 2 * f + j) * fv;
      }
      for (int c = 0; c < 3; ++c) {
        const int64_t at_a = (3 * a + c) * f + j, at_b = (3 * b + c) * f + j;
        V<T> to_a = da * u[c], to_b = -db * u[c];
        if (!first) to_a += na * load(&vec[at_b]), to_b += nb * load(&vec[at_a]);
        add<T>(v + at_a, to_a);
        add<T>(v + at_b, to_b);
      }
    }
  }

  void message_backward(const Pairs<T>& pairs, int64_t p, const T* fk, const T* gs, const T* gv, T* gcontext,
                        T* gvec, T* gfilter, PairGradient<T>& gp) const {
    const int64_t a = pairs.a[p], b = pairs.b[p];
    const T *ca = &context[a * widths()], *cb = &context[b * widths()], *u = &pairs.direction[3 * p];
    T *ga = gcontext + a * widths(), *gb = gcontext + b * widths();
    const T w = pairs.weight[p];
    V<T> gw{}, gu[3] = {};
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> fs = load(fk + j), sa = load(gs + a * f + j), sb = load(gs + b * f + j);
      const V<T> ts = sa * load(cb + j) + sb * load(ca + j);
      add<T>(gb + j, sa * fs * w), add<T>(ga + j, sb * fs * w);
      store<T>(gfilter + j, ts * w);
      gw += ts * fs;

      V<T> a3[3], b3[3];
      for (int c = 0; c < 3; ++c) a3[c] = load(gv + (3 * a + c) * f + j), b3[c] = load(gv + (3 * b + c) * f + j);
      const V<T> fd = load(fk + f + j), da = load(ca + f + j), db = load(cb + f + j);
      const V<T> dab = a3[0] * u[0] + a3[1] * u[1] + a3[2] * u[2];
      const V<T> dba = -(b3[0] * u[0] + b3[1] * u[1] + b3[2] * u[2]);
      add<T>(gb + f + j, dab * fd * w), add<T>(ga + f + j, dba * fd * w);
      const V<T> td = dab * db + dba * da;
      store<T>(gfilter + f + j, td * w);
      gw += td * fd;
      for (int c = 0; c < 3; ++c) gu[c] += (a3[c] * db - b3[c] * da) * fd;
      if (first) continue;

      const V<T> fv = load(fk + 2 * f + j), na = load(ca + 2 * f + j), nb = load(cb + 2 * f + j);
      const V<T> to_b = nb * fv * w, to_a = na * fv * w;
      V<T> vab{}, vba{};
      for (int c = 0; c < 3; ++c) {
        const int64_t at_a = (3 * a + c) * f + j, at_b = (3 * b + c) * f + j;
        vab += a3[c] * load(&vec[at_b]), vba += b3[c] * load(&vec[at_a]);
        add<T>(gvec + at_b, a3[c] * to_b), add<T>(gvec + at_a, b3[c] * to_a);
      }
      add<T>(gb + 2 * f + j, vab * fv * w), add<T>(ga + 2 * f + j, vba * fv * w);
      const V<T> tv = vab * nb + vba * na;
      store<T>(gfilter + 2 * f + j, tv * w);
      gw += tv * fv;
    }
    gp.weight[p] += total<T>(gw);
    for (int c = 0; c < 3; ++c) gp.direction[3 * p + c] += total<T>(gu[c]) * w;
  }

  // The update of every atom by itself.
  void mix(int64_t n, T* x, std::vector<T>& v_io) {
    projected.resize(n * 6 * f), joined.resize(n * 2 * f), hidden.resize(n * f), hidden_slope.resize(n * f);
    update.resize(n * 3 * f);
    vec_proj.apply(3 * n, v_io.data(), projected.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        V<T> square{};
        for (int c = 0; c < 3; ++c) {
          const V<T> v = load(&projected[(3 * i + c) * 2 * f + j]);
          square += v * v;
        }
        store<T>(&joined[2 * i * f + j], load(x + i * f + j));
        for (int l = 0; l < width<T>; ++l) joined[(2 * i + 1) * f + j + l] = std::sqrt(square[l] + epsilon);
      }
    update_in.apply(n, joined.data(), hidden.data());
    silu<T>(hidden.data(), hidden.data(), hidden_slope.data(), n * f);
    update_out.apply(n, hidden.data(), update.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        const T* u = &update[3 * i * f + j];
        V<T> dot{};
        for (int c = 0; c < 3; ++c) {
          const T* v = &projected[(3 * i + c) * 2 * f + j];
          dot += load(v) * load(v + f);
          add<T>(&v_io[(3 * i + c) * f + j], load(u + f) * load(v + f));
        }
        add<T>(x + i * f + j, load(u) + load(u + 2 * f) * dot);
      }
  }

  void mix_backward(int64_t n, T* gx, std::vector<T>& gvec) {
    std::vector<T> gupdate(n * 3 * f), gprojected(n * 6 * f), ghidden(n * f), gjoined(n * 2 * f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        const T* u = &update[3 * i * f + j];
        const V<T> g = load(gx + i * f + j), gdot = g * load(u + 2 * f);
        V<T> dot{}, gate{};
        for (int c = 0; c < 3; ++c) {
          const int64_t at = (3 * i + c) * 2 * f + j;
          const V<T> v = load(&projected[at]), w = load(&projected[at + f]);
          const V<T> go = load(&gvec[(3 * i + c) * f + j]);
          dot += v * w, gate += go * w;
          store<T>(&gprojected[at], gdot * w);
          store<T>(&gprojected[at + f], gdot * v + go * load(u + f));
        }
        T* gu = &gupdate[3 * i * f + j];
        store<T>(gu, g), store<T>(gu + f, gate), store<T>(gu + 2 * f, g * dot);
      }
    update_out.pull(n, gupdate.data(), ghidden.data());
    for (int64_t i = 0; i < n * f; i += width<T>) store<T>(&ghidden[i], load(&ghidden[i]) * load(&hidden_slope[i]));
    update_in.pull(n, ghidden.data(), gjoined.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        add<T>(gx + i * f + j, load(&gjoined[2 * i * f + j]));
        const V<T> g = load(&gjoined[(2 * i + 1) * f + j]) / load(&joined[(2 * i + 1) * f + j]);
        for (int c = 0; c < 3; ++c) {
          const int64_t at = (3 * i + c) * 2 * f + j;
          add<T>(&gprojected[at], g * load(&projected[at]));
        }
      }
    vec_proj.pull(3 * n, gprojected.data(), gvec.data(), true);
  }
};

template <class T> class PaiNN : public Network {
 public:
  // `weights` in the order of ffpretrain/md/native/weights.py; throws where their number does not fit.
  PaiNN(const Sizes& sizes, const T* weights, int64_t count) : s_(sizes), layers_(sizes.layers) {
    const T* at = weights;
    const int64_t f = s_.hidden, k = s_.rbf, rows = (3 * s_.layers - 1) * f;
    take(at, centers_, k), take(at, widths_, k), take(at, embedding_, s_.max_z * f);
    const T *filter_rows = at, *filter_bias = at + rows * k;
    at += rows * (k + 1);
    for (int64_t i = 0; i < s_.layers; ++i)
      layers_[i].read(at, f, k, i == 0, T(s_.epsilon), filter_rows, filter_bias);
    head_.read(at, f);
    if (at - weights != count) throw 1;
  }

  double energies(const Structure& s, double* energies) override {
    find(s, false);
    forward(s, false, energies);
    return pairs_.shortest;
  }

  double evaluate(const Structure& s, double* energies, double* gradient, double* virial) override {
    const int64_t n = s.n_atoms, f = s_.hidden, k = s_.rbf;
    std::fill(gradient, gradient + 3 * n, 0.0), std::fill(virial, virial + 9, 0.0);
    find(s, true);
    const bool keep = pairs_.size() * s_.layers * 3 * f * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
    forward(s, keep, energies);

    std::vector<T> gx(n * f), gvec(n * 3 * f);
    head_.pull(n, gx.data(), gvec.data());
    slopes_.clear(pairs_.size(), k);
    for (int64_t i = s_.layers - 1; i >= 0; --i) layers_[i].backward(n, pairs_, k, gx.data(), gvec, slopes_);
    pairs_.pull(slopes_, k, gradient, virial);
    return pairs_.shortest;
  }

 private:
  void find(const Structure& s, bool slopes) {
    pairs_.find(s, s_.cutoff);
    pairs_.measure(s_.cutoff);
    pairs_.gaussian(centers_, widths_, slopes);
  }

  // `keep`: the filters of all layers, for a backward pass to come.
  void forward(const Structure& s, bool keep, double* energies) {
    const int64_t n = s.n_atoms, f = s_.hidden;
    std::vector<T> x(n * f), vec;
    for (int64_t i = 0; i < n; ++i) std::copy_n(&embedding_[s.z[i] * f], f, &x[i * f]);
    for (auto& layer : layers_) layer.forward(n, pairs_, s_.rbf, x.data(), vec, keep);
    head_.apply(n, x.data(), vec.data(), energies);
  }

  Sizes s_;
  std::vector<T> centers_, widths_, embedding_;
  std::vector<Interaction<T>> layers_;
  EnergyHead<T> head_;
  Pairs<T> pairs_;
  PairGradient<T> slopes_;
};

}  // namespace ff
