// CPU kernels of the parts of G that are no network, and of the learned momentum: one or two passes over memory for
// what takes torch some ten each, and no call for each tensor of a param group.
//
// Built with block_permutation.cpp by native.py and called through ctypes. The plain forms are in lodo/mixture.py,
// lodo/scale.py, lodo/bases.py, lodo/preconditioners/log_diagonal.py and, for what moves the small tables,
// `lodo.meta.descend_`.
//
// Vectors of n numbers of type T are cut into the k tensors of a group by `offsets` (k + 1). Tables are of doubles.
// Sums are over chunks, whose results are added in order: they do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kChunk = 4096;           // numbers of a tensor that a thread takes at a time
constexpr int64_t kMinPerThread = 1 << 15; // numbers that make a second thread worth waking

struct Chunk {
  int64_t tensor, first, end;
};

// The vector of a group, cut at the tensors and within them.
struct Cut {
  std::vector<Chunk> chunks;
  int team = 1;

  Cut(const int64_t *offsets, int64_t tensors, int threads) {
    for (int64_t j = 0; j < tensors; ++j)
      for (int64_t first = offsets[j]; first < offsets[j + 1]; first += kChunk)
        chunks.push_back({j, first, std::min(first + kChunk, offsets[j + 1])});
#ifdef _OPENMP
    team = int(std::max<int64_t>(1, std::min<int64_t>(threads, offsets[tensors] / kMinPerThread)));
#endif
  }

  template <typename Body> void each(const Body &body) const {
    const int64_t count = int64_t(chunks.size());
    if (team == 1) { // a parallel region of one thread costs more than a small group's whole work
      for (int64_t i = 0; i < count; ++i) body(i, chunks[i]);
      return;
    }
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < count; ++i) body(i, chunks[i]);
  }
};

// The numbers of a step of `lodo.meta.descend_`.
struct Descent {
  double rate, forget1, forget2, bias1, bias2, tiny;
};

void descend(double *table, int64_t count, const double *slopes, const Descent &by) {
  double *u = table, *mean = table + count, *square = table + 2 * count;
  const double largest = 0.5 * std::sqrt(std::numeric_limits<double>::max());
  for (int64_t i = 0; i < count; ++i) {
    const double h = std::isfinite(slopes[i]) ? std::clamp(slopes[i], -largest, largest) : 0.0;
    mean[i] += by.forget1 * (h - mean[i]);
    square[i] += by.forget2 * (h * h - square[i]);
    u[i] -= by.rate * (mean[i] / by.bias1) / (std::sqrt(square[i] / by.bias2) + by.tiny);
  }
}

template <typename T> double dot(const T *__restrict a, const T *__restrict b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

// The softmax over the decays of the first (decays, tensors) of a table, as torch computes it.
std::vector<double> softmax(const double *u, int64_t decays, int64_t tensors) {
  std::vector<double> w(decays * tensors);
  for (int64_t j = 0; j < tensors; ++j) {
    double top = u[j], sum = 0;
    for (int64_t b = 1; b < decays; ++b) top = std::max(top, u[b * tensors + j]);
    for (int64_t b = 0; b < decays; ++b) sum += w[b * tensors + j] = std::exp(u[b * tensors + j] - top);
    for (int64_t b = 0; b < decays; ++b) w[b * tensors + j] /= sum;
  }
  return w;
}

template <typename T>
void mixture_learn(const T *momenta, const T *step, double *table, const double *decay, const int64_t *offsets,
                   int64_t decays, int64_t tensors, int threads, double steps, const Descent &by) {
  const Cut cut(offsets, tensors, threads);
  const int64_t n = offsets[tensors], entries = decays * tensors;
  std::vector<double> parts(cut.chunks.size() * decays), c(entries), h(entries);
  cut.each([&](int64_t i, const Chunk &at) {
    for (int64_t b = 0; b < decays; ++b)
      parts[i * decays + b] = dot(momenta + b * n + at.first, step + at.first, at.end - at.first);
  });
  for (size_t i = 0; i < cut.chunks.size(); ++i)
    for (int64_t b = 0; b < decays; ++b) c[b * tensors + cut.chunks[i].tensor] += parts[i * decays + b];
  const std::vector<double> w = softmax(table, decays, tensors);
  for (int64_t j = 0; j < tensors; ++j) {
    double mean = 0;
    for (int64_t b = 0; b < decays; ++b) {
      double &own = c[b * tensors + j];
      own /= 1 - std::pow(decay[b], steps);
      if (!std::isfinite(own)) own = 0;
      mean += w[b * tensors + j] * own;
    }
    for (int64_t b = 0; b < decays; ++b) h[b * tensors + j] = -w[b * tensors + j] * (c[b * tensors + j] - mean);
  }
  descend(table, entries, h.data(), by);
}

template <typename T>
void mixture_mix(T *momenta, const T *g, T *m, const double *table, const double *decay, const int64_t *offsets,
                 int64_t decays, int64_t tensors, int threads, double steps, double active) {
  const Cut cut(offsets, tensors, threads);
  const int64_t n = offsets[tensors];
  const std::vector<double> w = softmax(table, decays, tensors);
  cut.each([&](int64_t, const Chunk &at) {
    const int64_t count = at.end - at.first;
    const T *__restrict from = g + at.first;
    T *__restrict to = m + at.first;
    std::fill(to, to + count, T(0));
    for (int64_t b = 0; b < decays; ++b) {
      T *__restrict own = momenta + b * n + at.first;
      const double forget = active * (1 - decay[b]), correction = 1 - std::pow(decay[b], steps);
      const T share = T(w[b * tensors + at.tensor] / correction), fresh = T(forget), old = T(1 - forget);
      if (forget < 0.5) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] += share * (own[i] += fresh * (from[i] - own[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] += share * (own[i] = from[i] - old * (from[i] - own[i]));
      }
    }
  });
}

template <typename T>
void scale_learn(const T *g, const T *moves, double *table, const int64_t *offsets, int64_t tensors, int threads,
                 const Descent &by) {
  const Cut cut(offsets, tensors, threads);
  std::vector<double> parts(cut.chunks.size()), h(tensors);
  cut.each([&](int64_t i, const Chunk &at) { parts[i] = dot(g + at.first, moves + at.first, at.end - at.first); });
  for (size_t i = 0; i < cut.chunks.size(); ++i) h[cut.chunks[i].tensor] -= parts[i];
  descend(table, tensors, h.data(), by);
}

// out = S^power * by * vector, without `by` if that is null.
template <typename T>
void scale_times(const T *vector, const T *by, T *out, const double *table, double power, double largest,
                 const int64_t *offsets, int64_t tensors, int threads) {
  Cut(offsets, tensors, threads).each([&](int64_t, const Chunk &at) {
    const T factor = T(std::exp(std::clamp(power * table[at.tensor], -largest, largest)));
    if (by == nullptr) {
#pragma omp simd
      for (int64_t i = at.first; i < at.end; ++i) out[i] = factor * vector[i];
    } else {
#pragma omp simd
      for (int64_t i = at.first; i < at.end; ++i) out[i] = factor * (by[i] * vector[i]);
    }
  });
}

// gains = S D, times `others` unless that is null, once v has taken in g unless that is null.
template <typename T>
void adam_gains(T *square, const T *g, const T *others, T *gains, const double *table, const int64_t *offsets,
                int64_t tensors, int threads, T weight, T inverse_bias, T eps, double largest) {
  Cut(offsets, tensors, threads).each([&](int64_t, const Chunk &at) {
    const T scale = table == nullptr ? T(1) : T(std::exp(std::clamp(table[at.tensor], -largest, largest)));
    if (g != nullptr) {
#pragma omp simd
      for (int64_t i = at.first; i < at.end; ++i) square[i] += weight * (g[i] * g[i] - square[i]);
    }
#pragma omp simd
    for (int64_t i = at.first; i < at.end; ++i) gains[i] = scale / (std::sqrt(square[i] * inverse_bias) + eps);
    if (others != nullptr) {
#pragma omp simd
      for (int64_t i = at.first; i < at.end; ++i) gains[i] *= others[i];
    }
  });
}

template <typename T>
void log_diagonal_learn(T *theta, T *mean, T *square, const T *reply, const T *m, int64_t size, int threads, T lr,
                        T step_size, T forget1, T keep2, T forget2, T eps) {
  const int64_t all[] = {0, size};
  Cut(all, 1, threads).each([&](int64_t, const Chunk &at) {
    if (mean == nullptr) {
#pragma omp simd
      for (int64_t i = at.first; i < at.end; ++i) theta[i] += step_size * lr * reply[i] * m[i];
      return;
    }
#pragma omp simd
    for (int64_t i = at.first; i < at.end; ++i) {
      const T h = -lr * reply[i] * m[i];
      mean[i] += forget1 * (h - mean[i]);
      square[i] = keep2 * square[i] + forget2 * h * h;
      theta[i] -= step_size * mean[i] / (std::sqrt(square[i]) + eps);
    }
  });
}

} // namespace

#define LODO_PARTS(T, SUFFIX)                                                                                          \
  extern "C" void lodo_mixture_learn_##SUFFIX(                                                                         \
      const T *momenta, const T *step, double *table, const double *decay, const int64_t *offsets, int64_t decays,     \
      int64_t tensors, int threads, double steps, double rate, double forget1, double forget2, double bias1,           \
      double bias2, double tiny) {                                                                                     \
    mixture_learn(momenta, step, table, decay, offsets, decays, tensors, threads, steps,                               \
                  {rate, forget1, forget2, bias1, bias2, tiny});                                                       \
  }                                                                                                                    \
  extern "C" void lodo_mixture_mix_##SUFFIX(T *momenta, const T *g, T *m, const double *table, const double *decay,    \
                                            const int64_t *offsets, int64_t decays, int64_t tensors, int threads,      \
                                            double steps, double active) {                                             \
    mixture_mix(momenta, g, m, table, decay, offsets, decays, tensors, threads, steps, active);                        \
  }                                                                                                                    \
  extern "C" void lodo_scale_learn_##SUFFIX(const T *g, const T *moves, double *table, const int64_t *offsets,         \
                                            int64_t tensors, int threads, double rate, double forget1, double forget2, \
                                            double bias1, double bias2, double tiny) {                                 \
    scale_learn(g, moves, table, offsets, tensors, threads, {rate, forget1, forget2, bias1, bias2, tiny});             \
  }                                                                                                                    \
  extern "C" void lodo_scale_times_##SUFFIX(const T *vector, const T *by, T *out, const double *table,                 \
                                            const int64_t *offsets, int64_t tensors, int threads, double power,        \
                                            double largest) {                                                          \
    scale_times(vector, by, out, table, power, largest, offsets, tensors, threads);                                    \
  }                                                                                                                    \
  extern "C" void lodo_adam_gains_##SUFFIX(T *square, const T *g, const T *others, T *gains, const double *table,      \
                                           const int64_t *offsets, int64_t tensors, int threads, double weight,        \
                                           double bias, double eps, double largest) {                                  \
    adam_gains(square, g, others, gains, table, offsets, tensors, threads, T(weight), T(1 / bias), T(eps), largest);   \
  }                                                                                                                    \
  extern "C" void lodo_log_diagonal_learn_##SUFFIX(                                                                    \
      T *theta, T *mean, T *square, const T *reply, const T *m, int64_t size, int threads, double lr,                  \
      double step_size, double forget1, double keep2, double forget2, double eps) {                                    \
    log_diagonal_learn(theta, mean, square, reply, m, size, threads, T(lr), T(step_size), T(forget1), T(keep2),        \
                       T(forget2), T(eps));                                                                            \
  }

LODO_PARTS(float, f32)
LODO_PARTS(double, f64)
