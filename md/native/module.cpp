// The functions that Python calls. All sizes are checked there.
#include "torchmd_et.hpp"

using ff::Sizes;
using ff::Structure;

extern "C" {

int64_t ff_lanes(int64_t bytes) { return FF_BYTES / bytes; }

void* ff_et_create(int64_t bytes, const int64_t* sizes, double cutoff, const void* weights, int64_t count) {
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], cutoff};
  try {
    if (bytes == 8) return new ff::TorchMDET<double>(s, static_cast<const double*>(weights), count);
    return new ff::TorchMDET<float>(s, static_cast<const float*>(weights), count);
  } catch (...) {
    return nullptr;
  }
}

void ff_et_destroy(int64_t bytes, void* handle) {
  if (bytes == 8)
    delete static_cast<ff::TorchMDET<double>*>(handle);
  else
    delete static_cast<ff::TorchMDET<float>*>(handle);
}

// Returns the shortest distance in Å, or a negative number where memory ran out.
double ff_et_evaluate(int64_t bytes, void* handle, int64_t n_atoms, int64_t n_pairs, const int64_t* z,
                      const int64_t* a, const int64_t* b, const double* pos, const double* shift,
                      double* energies, double* gradient, double* virial) {
  const Structure s{n_atoms, n_pairs, z, a, b, pos, shift};
  try {
    if (bytes == 8) return static_cast<ff::TorchMDET<double>*>(handle)->evaluate(s, energies, gradient, virial);
    return static_cast<ff::TorchMDET<float>*>(handle)->evaluate(s, energies, gradient, virial);
  } catch (...) {
    return -1.0;
  }
}
}
