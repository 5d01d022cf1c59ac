// What every native network is to the functions that Python calls.
#pragma once
#include "geometry.hpp"

namespace ff {

struct Sizes {
  int64_t hidden, layers, heads, rbf, max_z;
  double cutoff, epsilon;
};

class Network {
 public:
  virtual ~Network() = default;
  // energies [n] and gradient [n, 3] in units of the network (per Å), virial [3, 3]; returns the shortest distance.
  virtual double evaluate(const Structure& s, double* energies, double* gradient, double* virial) = 0;
  // The same energies, to the last bit, without what their derivative needs; returns the shortest distance.
  virtual double energies(const Structure& s, double* energies) = 0;
};

template <class T> void take(const T*& from, std::vector<T>& to, int64_t count) {
  to.assign(from, from + count);
  from += count;
}

}  // namespace ff
