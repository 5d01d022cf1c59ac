// The functions that Python calls. All sizes are checked there.
#include "painn.hpp"
#include "torchmd_et.hpp"

using ff::Network;
using ff::Sizes;
using ff::Structure;

template <class T> static Network* create(int64_t kind, const Sizes& s, const void* weights, int64_t count) {
  const T* values = static_cast<const T*>(weights);
  if (kind == 0) return new ff::TorchMDET<T>(s, values, count);
  return new ff::PaiNN<T>(s, values, count);
}

extern "C" {

int64_t ff_lanes(int64_t bytes) { return FF_BYTES / bytes; }

// kind: 0 torchmd-et, 1 painn; bytes: of one number; sizes: hidden, layers, heads, rbf, max_z.
void* ff_create(int64_t kind, int64_t bytes, const int64_t* sizes, double cutoff, double epsilon,
                const void* weights, int64_t count) {
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], cutoff, epsilon};
  try {
    return bytes == 8 ? create<double>(kind, s, weights, count) : create<float>(kind, s, weights, count);
  } catch (...) {
    return nullptr;
  }
}

void ff_destroy(void* handle) { delete static_cast<Network*>(handle); }

// Returns the shortest distance in Å, or a negative number where memory ran out.
double ff_evaluate(void* handle, int64_t n_atoms, int64_t n_pairs, const int64_t* z, const int64_t* a,
                   const int64_t* b, const double* pos, const double* shift, double* energies, double* gradient,
                   double* virial) {
  const Structure s{n_atoms, n_pairs, z, a, b, pos, shift};
  try {
    return static_cast<Network*>(handle)->evaluate(s, energies, gradient, virial);
  } catch (...) {
    return -1.0;
  }
}

// The energies alone; returns what ff_evaluate does.
double ff_energies(void* handle, int64_t n_atoms, int64_t n_pairs, const int64_t* z, const int64_t* a,
                   const int64_t* b, const double* pos, const double* shift, double* energies) {
  const Structure s{n_atoms, n_pairs, z, a, b, pos, shift};
  try {
    return static_cast<Network*>(handle)->energies(s, energies);
  } catch (...) {
    return -1.0;
  }
}
}
