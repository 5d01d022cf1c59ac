// One attention layer of the equivariant transformer over pairs that are listed once.
//
// A pair's filters depend on its distance only, so both of its directions share them: half the matrix products
// of a list that has each pair twice. Pairs go through in chunks whose filters stay in the cache.
#pragma once
#include "blocks.hpp"
#include "geometry.hpp"

namespace ff {

template <class T> struct Attention {
  LayerNorm<T> norm;
  Linear<T> mix, filters, out, vec_proj;
  std::vector<T> self_filter;
  int64_t f = 0, heads = 0;
  bool first = false;
  // kept from forward for backward
  std::vector<T> normal, inverse, mixed, vec, projected, mixed_out, logits, self_logits, kept;
  std::vector<T> sum_s, chunk_raw, chunk, chunk_slope, gate_ab, gate_ba;

  int64_t blocks() const { return first ? 4 : 5; }   // q k x d (v)
  int64_t widths() const { return (first ? 3 : 4) * f; }  // filters of k x d (v)

  void read(const T*& source, int64_t hidden, int64_t n_heads, int64_t rbf, bool is_first) {
    f = hidden, heads = n_heads, first = is_first;
    norm.read(source, f);
    mix.read(source, f, blocks() * f, true);
    filters.read(source, rbf, widths(), true);
    out.read(source, f, (first ? 1 : 3) * f, true);
    if (!first) vec_proj.read(source, f, 3 * f, false);
  }

  // x [n, f] and vec [n, 3, f] in place; vec_in is ignored by the first layer.
  void forward(int64_t n, const Pairs<T>& pairs, int64_t k, T* x, std::vector<T>& vec_io, bool keep) {
    const int64_t wide = blocks() * f, p_all = pairs.size();
    normal.resize(n * f), inverse.resize(n), mixed.resize(n * wide), sum_s.assign(n * f, T(0));
    logits.resize(p_all * 2 * heads), self_logits.resize(n * heads);
    gate_ab.resize(f), gate_ba.resize(f);
    chunk_raw.resize(kChunk * widths()), chunk.resize(kChunk * widths()), chunk_slope.resize(kChunk * widths());
    kept.resize(keep ? p_all * widths() : 0);
    std::vector<T> normed(n * f), v_sum(n * 3 * f, T(0));
    if (!first) vec = vec_io;
    norm.apply(n, x, normed.data(), normal.data(), inverse.data());
    mix.apply(n, normed.data(), mixed.data());
    for (int64_t i = 0; i < n; ++i) self_forward(i, &sum_s[i * f], &v_sum[3 * i * f]);
    for (int64_t start = 0; start < p_all; start += kChunk) {
      const int64_t count = std::min(kChunk, p_all - start);
      T* raw = keep ? &kept[start * widths()] : chunk_raw.data();
      filters.apply(count, &pairs.basis[start * k], raw);
      silu<T>(raw, chunk.data(), static_cast<T*>(nullptr), count * widths());
      for (int64_t p = 0; p < count; ++p) pair_forward(pairs, start + p, &chunk[p * widths()], v_sum.data());
    }
    mixed_out.resize(n * (first ? 1 : 3) * f);
    out.apply(n, sum_s.data(), mixed_out.data());
    if (first) {
      for (int64_t i = 0; i < n * f; i += width<T>) add<T>(x + i, load(&mixed_out[i]));
      vec_io = std::move(v_sum);
      return;
    }
    projected.resize(n * 9 * f);
    vec_proj.apply(3 * n, vec.data(), projected.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        const T* o = &mixed_out[3 * i * f + j];
        V<T> dot{};
        for (int c = 0; c < 3; ++c) {
          const T* v = &projected[(3 * i + c) * 3 * f + j];
          const int64_t at = (3 * i + c) * f + j;
          dot += load(v) * load(v + f);
          store<T>(&vec_io[at], load(&vec[at]) + load(v + 2 * f) * load(o) + load(&v_sum[at]));
        }
        add<T>(x + i * f + j, dot * load(o + f) + load(o + 2 * f));
      }
  }

  // From the derivatives with respect to this layer's output to those with respect to its input, in place.
  void backward(int64_t n, const Pairs<T>& pairs, int64_t k, T* gx, std::vector<T>& gvec, PairGradient<T>& gp) {
    const int64_t wide = blocks() * f, p_all = pairs.size();
    std::vector<T> gs(n * f), gmixed(n * wide, T(0)), gv;
    if (first) {
      out.pull(n, gx, gs.data());
      gv = gvec;
      std::fill(gvec.begin(), gvec.end(), T(0));
    } else {
      gv = gvec;
      update_backward(n, gx, gvec, gs);
    }
    for (int64_t i = 0; i < n; ++i) self_backward(i, &gs[i * f], &gv[3 * i * f], &gmixed[i * wide], &gvec[3 * i * f]);
    std::vector<T> gfilter(kChunk * widths());
    for (int64_t start = 0; start < p_all; start += kChunk) {
      const int64_t count = std::min(kChunk, p_all - start);
      const T* raw = kept.empty() ? chunk_raw.data() : &kept[start * widths()];
      if (kept.empty()) filters.apply(count, &pairs.basis[start * k], chunk_raw.data());
      silu<T>(raw, chunk.data(), chunk_slope.data(), count * widths());
      for (int64_t p = 0; p < count; ++p)
        pair_backward(pairs, start + p, &chunk[p * widths()], &chunk_slope[p * widths()], gs.data(), gv.data(),
                      gmixed.data(), gvec.data(), &gfilter[p * widths()], gp);
      filters.pull(count, gfilter.data(), &gp.basis[start * k], true);
    }
    std::vector<T> gnormed(n * f);
    mix.pull(n, gmixed.data(), gnormed.data());
    norm.pull(n, gnormed.data(), gx, normal.data(), inverse.data());
  }

 private:
  // Per-head sums of f values in `product`.
  void head_sums(const T* product, T* sums) const {
    const int64_t size = f / heads;
    for (int64_t h = 0; h < heads; ++h) {
      T sum = 0;
      if (size % width<T> == 0) {
        V<T> v{};
        for (int64_t j = 0; j < size; j += width<T>) v += load(product + h * size + j);
        sum = total<T>(v);
      } else {
        for (int64_t j = 0; j < size; ++j) sum += product[h * size + j];
      }
      sums[h] = sum;
    }
  }
  static T silu_one(T x) { return x / (T(1) + std::exp(-x)); }
  static T silu_slope(T x) {
    const T s = T(1) / (T(1) + std::exp(-x));
    return s * (T(1) + x * (T(1) - s));
  }
  // Spreads one value a head over the head's features.
  void over_heads(const T* values, T* target) const {
    const int64_t size = f / heads;
    for (int64_t h = 0; h < heads; ++h) std::fill(target + h * size, target + (h + 1) * size, values[h]);
  }

  void self_forward(int64_t i, T* s, T* v) {
    const T *m = &mixed[i * blocks() * f], *fk = self_filter.data();
    T product[kMost], gates[kMostHeads];
    for (int64_t j = 0; j < f; j += width<T>) store<T>(product + j, load(m + j) * load(m + f + j) * load(fk + j));
    head_sums(product, &self_logits[i * heads]);
    for (int64_t h = 0; h < heads; ++h) gates[h] = silu_one(self_logits[i * heads + h]);
    over_heads(gates, gate_ab.data());
    for (int64_t j = 0; j < f; j += width<T>) {
      add<T>(s + j, load(m + 2 * f + j) * load(fk + f + j) * load(&gate_ab[j]));
      if (first) continue;
      const V<T> value = load(m + 4 * f + j) * load(fk + 3 * f + j);
      for (int c = 0; c < 3; ++c) add<T>(v + c * f + j, value * load(&vec[(3 * i + c) * f + j]));
    }
  }

  void pair_forward(const Pairs<T>& pairs, int64_t p, const T* fk, T* v_sum) {
    const int64_t a = pairs.a[p], b = pairs.b[p], wide = blocks() * f;
    const T *ma = &mixed[a * wide], *mb = &mixed[b * wide], *u = &pairs.direction[3 * p], w = pairs.weight[p];
    T ab[kMost], ba[kMost], gates[kMostHeads];
    for (int64_t j = 0; j < f; j += width<T>) {
      store<T>(ab + j, load(ma + j) * load(mb + f + j) * load(fk + j));
      store<T>(ba + j, load(mb + j) * load(ma + f + j) * load(fk + j));
    }
    T* l = &logits[2 * p * heads];
    head_sums(ab, l), head_sums(ba, l + heads);
    for (int64_t h = 0; h < heads; ++h) gates[h] = silu_one(l[h]);
    over_heads(gates, gate_ab.data());
    for (int64_t h = 0; h < heads; ++h) gates[h] = silu_one(l[heads + h]);
    over_heads(gates, gate_ba.data());
    T *sa = &sum_s[a * f], *sb = &sum_s[b * f], *va = v_sum + 3 * a * f, *vb = v_sum + 3 * b * f;
    const T *vec_a = first ? nullptr : &vec[3 * a * f], *vec_b = first ? nullptr : &vec[3 * b * f];
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> fx = load(fk + f + j) * w, fd = load(fk + 2 * f + j) * w;
      add<T>(sa + j, load(mb + 2 * f + j) * fx * load(&gate_ab[j]));
      add<T>(sb + j, load(ma + 2 * f + j) * fx * load(&gate_ba[j]));
      const V<T> da = load(mb + 3 * f + j) * fd, db = load(ma + 3 * f + j) * fd;
      V<T> na{}, nb{};
      if (!first) {
        const V<T> fv = load(fk + 3 * f + j) * w;
        na = load(mb + 4 * f + j) * fv, nb = load(ma + 4 * f + j) * fv;
      }
      for (int c = 0; c < 3; ++c) {
        V<T> to_a = da * u[c], to_b = -db * u[c];
        if (!first) to_a += na * load(vec_b + c * f + j), to_b += nb * load(vec_a + c * f + j);
        add<T>(va + c * f + j, to_a);
        add<T>(vb + c * f + j, to_b);
      }
    }
  }

  // The residual update: gs of the summed values; gvec becomes that of the incoming vectors but for messages.
  void update_backward(int64_t n, const T* gx, std::vector<T>& gvec, std::vector<T>& gs) {
    std::vector<T> gout(n * 3 * f), gproj(n * 9 * f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < f; j += width<T>) {
        const T* o = &mixed_out[3 * i * f + j];
        const V<T> g = load(gx + i * f + j), gdot = g * load(o + f);
        V<T> dot{}, gate{};
        for (int c = 0; c < 3; ++c) {
          const int64_t at = (3 * i + c) * 3 * f + j;
          const V<T> v1 = load(&projected[at]), v2 = load(&projected[at + f]), v3 = load(&projected[at + 2 * f]);
          const V<T> gv = load(&gvec[(3 * i + c) * f + j]);
          dot += v1 * v2, gate += gv * v3;
          store<T>(&gproj[at], gdot * v2);
          store<T>(&gproj[at + f], gdot * v1);
          store<T>(&gproj[at + 2 * f], gv * load(o));
        }
        T* go = &gout[3 * i * f + j];
        store<T>(go, gate), store<T>(go + f, g * dot), store<T>(go + 2 * f, g);
      }
    out.pull(n, gout.data(), gs.data());
    vec_proj.pull(3 * n, gproj.data(), gvec.data(), true);
  }

  void self_backward(int64_t i, const T* gs, const T* gv, T* gm, T* gvec) {
    const T *m = &mixed[i * blocks() * f], *fk = self_filter.data();
    T product[kMost], sums[kMostHeads], gates[kMostHeads];
    for (int64_t j = 0; j < f; j += width<T>)
      store<T>(product + j, load(gs + j) * load(m + 2 * f + j) * load(fk + f + j));
    head_sums(product, sums);
    for (int64_t h = 0; h < heads; ++h) {
      gates[h] = silu_one(self_logits[i * heads + h]);
      sums[h] *= silu_slope(self_logits[i * heads + h]);
    }
    over_heads(gates, gate_ab.data()), over_heads(sums, gate_ba.data());
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> g = load(&gate_ba[j]) * load(fk + j);
      add<T>(gm + j, g * load(m + f + j));
      add<T>(gm + f + j, g * load(m + j));
      add<T>(gm + 2 * f + j, load(gs + j) * load(&gate_ab[j]) * load(fk + f + j));
      if (first) continue;
      const V<T> fv = load(fk + 3 * f + j), value = load(m + 4 * f + j) * fv;
      V<T> g4{};
      for (int c = 0; c < 3; ++c) {
        g4 += load(gv + c * f + j) * load(&vec[(3 * i + c) * f + j]);
        add<T>(gvec + c * f + j, load(gv + c * f + j) * value);
      }
      add<T>(gm + 4 * f + j, g4 * fv);
    }
  }

  void pair_backward(const Pairs<T>& pairs, int64_t p, const T* fk, const T* slope, const T* gs, const T* gv,
                     T* gmixed, T* gvec, T* gfilter, PairGradient<T>& gp) {
    const int64_t a = pairs.a[p], b = pairs.b[p], wide = blocks() * f;
    const T *ma = &mixed[a * wide], *mb = &mixed[b * wide], *u = &pairs.direction[3 * p], w = pairs.weight[p];
    const T *sa = gs + a * f, *sb = gs + b * f, *va = gv + 3 * a * f, *vb = gv + 3 * b * f;
    T *ga = gmixed + a * wide, *gb = gmixed + b * wide;
    T ab[kMost], ba[kMost], sums[kMostHeads], gates[kMostHeads], g_ab[kMost], g_ba[kMost];
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> fx = load(fk + f + j) * w;
      store<T>(ab + j, load(sa + j) * load(mb + 2 * f + j) * fx);
      store<T>(ba + j, load(sb + j) * load(ma + 2 * f + j) * fx);
    }
    const T* l = &logits[2 * p * heads];
    head_sums(ab, sums);
    for (int64_t h = 0; h < heads; ++h) gates[h] = silu_one(l[h]), sums[h] *= silu_slope(l[h]);
    over_heads(gates, gate_ab.data()), over_heads(sums, g_ab);
    head_sums(ba, sums);
    for (int64_t h = 0; h < heads; ++h) gates[h] = silu_one(l[heads + h]), sums[h] *= silu_slope(l[heads + h]);
    over_heads(gates, gate_ba.data()), over_heads(sums, g_ba);

    V<T> gw{}, gu[3] = {};
    for (int64_t j = 0; j < f; j += width<T>) {
      const V<T> qa = load(ma + j), qb = load(mb + j), ka = load(ma + f + j), kb = load(mb + f + j);
      const V<T> k0 = load(fk + j), hab = load(g_ab + j), hba = load(g_ba + j);
      add<T>(ga + j, hab * kb * k0), add<T>(gb + f + j, hab * qa * k0);
      add<T>(gb + j, hba * ka * k0), add<T>(ga + f + j, hba * qb * k0);
      store<T>(gfilter + j, (hab * qa * kb + hba * qb * ka) * load(slope + j));

      const V<T> fx = load(fk + f + j), xab = load(sa + j) * load(&gate_ab[j]), xba = load(sb + j) * load(&gate_ba[j]);
      add<T>(gb + 2 * f + j, xab * fx * w), add<T>(ga + 2 * f + j, xba * fx * w);
      const V<T> tx = xab * load(mb + 2 * f + j) + xba * load(ma + 2 * f + j);
      store<T>(gfilter + f + j, tx * w * load(slope + f + j));
      gw += tx * fx;

      V<T> a3[3], b3[3];
      for (int c = 0; c < 3; ++c) a3[c] = load(va + c * f + j), b3[c] = load(vb + c * f + j);
      const V<T> fd = load(fk + 2 * f + j), da = load(ma + 3 * f + j), db = load(mb + 3 * f + j);
      const V<T> dab = a3[0] * u[0] + a3[1] * u[1] + a3[2] * u[2];
      const V<T> dba = -(b3[0] * u[0] + b3[1] * u[1] + b3[2] * u[2]);
      add<T>(gb + 3 * f + j, dab * fd * w), add<T>(ga + 3 * f + j, dba * fd * w);
      const V<T> td = dab * db + dba * da;
      store<T>(gfilter + 2 * f + j, td * w * load(slope + 2 * f + j));
      gw += td * fd;
      for (int c = 0; c < 3; ++c) gu[c] += (a3[c] * db - b3[c] * da) * fd;
      if (first) continue;

      const V<T> fv = load(fk + 3 * f + j), na = load(ma + 4 * f + j), nb = load(mb + 4 * f + j);
      const V<T> to_b = nb * fv * w, to_a = na * fv * w;
      V<T> vab{}, vba{};
      for (int c = 0; c < 3; ++c) {
        vab += a3[c] * load(&vec[(3 * b + c) * f + j]);
        vba += b3[c] * load(&vec[(3 * a + c) * f + j]);
        add<T>(gvec + (3 * b + c) * f + j, a3[c] * to_b);
        add<T>(gvec + (3 * a + c) * f + j, b3[c] * to_a);
      }
      add<T>(gb + 4 * f + j, vab * fv * w), add<T>(ga + 4 * f + j, vba * fv * w);
      const V<T> tv = vab * nb + vba * na;
      store<T>(gfilter + 3 * f + j, tv * w * load(slope + 3 * f + j));
      gw += tv * fv;
    }
    gp.weight[p] += total<T>(gw);
    for (int c = 0; c < 3; ++c) gp.direction[3 * p + c] += total<T>(gu[c]) * w;
  }

  static constexpr int64_t kMost = 1024, kMostHeads = 64;
};

}  // namespace ff
