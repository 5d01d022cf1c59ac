// Messages over pairs that are listed once: the sums at each atom, their derivative, and the derivative of that
// along a direction, as training on forces needs it.
//
// One text of each network's messages serves all three: it is written over numbers that are either plain or
// carry a tangent. Where they do, the incoming derivatives gx and gd are held fixed and only tangents are
// written out: those of the sums (the derivative with respect to gx and gd) and those of the derivative (with
// respect to everything else).
//
// Heads of the attention, or without it channels, do not see each other, so threads share them out: no two write
// to the same place.
#pragma once
#include "dual.hpp"

namespace ff {

template <class T> struct MessageData {
  int64_t n, pairs, f, heads, vectors, selves;  // heads: 0 for PaiNN; vectors: whether there are incoming ones
  const int64_t *a, *b;                         // [pairs], centre and neighbour of one direction
  // [n,mf] [n,3,f] [rows,kf] [rows] [rows,3]; blocks m and k: 5 and 4 with attention, 3 and 3 without, one less
  // of each without incoming vectors
  const T *mixed, *vec, *pre, *weight, *direction;
  const T *d_mixed, *d_vec, *d_pre, *d_weight, *d_direction;  // tangents
  const T *gx, *gd;                             // [n,f] [n,3,f]
  T *x, *d;                                     // [n,f] [n,3,f]
  // g_pre need not be zero, but in the last row if atoms are their own neighbours; g_geometry is [rows,4], of
  // weight and direction, one thread's own
  T *g_mixed, *g_vec, *g_pre, *g_geometry;
};

}  // namespace ff
