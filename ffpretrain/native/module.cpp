// The functions that Python calls. All sizes and types are checked there.
#include <thread>
#include <vector>

#include "attention_messages.hpp"
#include "painn_messages.hpp"

using ff::MessageData;

namespace {

// what is asked for
enum Task { kSums, kGradient, kTangents };

// Part `t` of `of`: some of the heads or, without attention, of the vectors of channels.
template <class T, int W, bool... Asked> void part(const MessageData<T>& data, int64_t t, int64_t of) {
  const int64_t units = data.heads ? data.heads : data.f / W, first = t * units / of, last = (t + 1) * units / of;
  if (data.heads) ff::AttentionMessages<T, W, Asked...>(data).run(first, last);
  else if (data.vectors) ff::PainnMessages<T, W, true, Asked...>(data).run(first, last);
  else ff::PainnMessages<T, W, false, Asked...>(data).run(first, last);
}

template <class T, int W> void part(int64_t task, const MessageData<T>& data, int64_t t, int64_t of) {
  if (task == kSums) part<T, W, false, true, false>(data, t, of);
  else if (task == kGradient) part<T, W, false, false, true>(data, t, of);
  else part<T, W, true, true, true>(data, t, of);
}

template <class T> void share(int64_t task, const MessageData<T>& data, int64_t t, int64_t of) {
  const int64_t channels = data.heads ? data.f / data.heads : data.f, widest = FF_BYTES / sizeof(T);
  if (channels % widest == 0) part<T, FF_BYTES / sizeof(T)>(task, data, t, of);
  else if (channels % 4 == 0) part<T, 4>(task, data, t, of);
  else part<T, 1>(task, data, t, of);
}

template <class T> void messages(int64_t task, const int64_t* sizes, const void* const* p, int64_t threads) {
  MessageData<T> data{};
  data.n = sizes[0], data.pairs = sizes[1], data.f = sizes[2], data.heads = sizes[3];
  data.vectors = sizes[4], data.selves = sizes[5];
  data.a = static_cast<const int64_t*>(p[0]), data.b = static_cast<const int64_t*>(p[1]);
  const T** in[] = {&data.mixed, &data.vec, &data.pre, &data.weight, &data.direction, &data.d_mixed, &data.d_vec,
                    &data.d_pre, &data.d_weight, &data.d_direction, &data.gx, &data.gd};
  int64_t at = 2;
  for (const T** one : in) *one = static_cast<const T*>(p[at++]);
  T** out[] = {&data.x, &data.d, &data.g_mixed, &data.g_vec, &data.g_pre, &data.g_geometry};
  for (T** one : out) *one = static_cast<T*>(const_cast<void*>(p[at++]));
  const int64_t rows = data.pairs + (data.selves ? 1 : 0);
  auto piece = [=](int64_t t) {
    MessageData<T> own = data;
    if (own.g_geometry) own.g_geometry += t * rows * 4;
    share<T>(task, own, t, threads);
  };
#ifdef _OPENMP
  // torch's own threads: others would wait while those spin in expectation of the next operation
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) piece(t);
#else
  std::vector<std::thread> others;
  int64_t started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(piece, started);
  } catch (...) {  // no thread left: the others' parts are done here
  }
  piece(0);
  for (; started < threads; ++started) piece(started);
  for (std::thread& one : others) one.join();
#endif
}

}  // namespace

extern "C" {

// bytes: of one number; sizes: atoms, pairs, features, heads (0 for PaiNN), whether there are vectors, and pairs of
// an atom with itself; pointers: in the order of `MessageData`, null where the task has no use for them.
// Returns 0, or 1 where memory ran out.
int64_t ff_messages(int64_t task, int64_t bytes, const int64_t* sizes, const void* const* pointers,
                    int64_t threads) {
  try {
    if (bytes == 8) messages<double>(task, sizes, pointers, threads);
    else messages<float>(task, sizes, pointers, threads);
    return 0;
  } catch (...) {
    return 1;
  }
}
}
