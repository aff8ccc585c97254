// CPU kernels of the step whose G is diagonal (lodo/fused.py): one pass over memory for lines 1 and 2 of Algorithm 1,
// one for lines 3 and 4, and no call for each tensor of a param group.
//
// Built with block_permutation.cpp by native.py and called through ctypes. The plain form is lodo/step.py with what it
// calls: lodo/mixture.py, lodo/scale.py, lodo/bases.py, lodo/preconditioners/log_diagonal.py and, for what moves the
// small tables, `lodo.meta.descend_`. Pointers are null for parts that there are not.
//
// Vectors of n numbers of type T are cut into the k tensors of a group by `offsets` (k + 1). Tables are of doubles.
// Sums are over chunks, whose results are added in order: they do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kChunk = 2048;           // numbers of a tensor that a thread takes at a time: they fit in its cache
constexpr int64_t kBlock = 256;            // of these, products that are added in their own precision
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
  double rate, forget1, forget2, bias1, bias2, tiny, bound;
};

void descend(double *table, int64_t count, const double *slopes, const Descent &by) {
  double *u = table, *mean = table + count, *square = table + 2 * count;
  const double largest = 0.5 * std::sqrt(std::numeric_limits<double>::max());
  for (int64_t i = 0; i < count; ++i) {
    const double h = std::isfinite(slopes[i]) ? std::clamp(slopes[i], -largest, largest) : 0.0;
    mean[i] += by.forget1 * (h - mean[i]);
    square[i] += by.forget2 * (h * h - square[i]);
    u[i] -= by.rate * (mean[i] / by.bias1) / (std::sqrt(square[i] / by.bias2) + by.tiny);
    u[i] = std::clamp(u[i], -by.bound, by.bound);
  }
}

template <typename T> double dot(const T *a, const T *b, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += a[i] * b[i];
    total += double(sum);
  }
  return total;
}

// The sum of squares: in doubles where those of type T may overflow or vanish.
template <typename T> double energy(const T *a, int64_t count) {
  const double total = dot(a, a, count);
  if (std::isfinite(total) && total > 1e-30) return total;
  double wide = 0;
  for (int64_t i = 0; i < count; ++i) wide += double(a[i]) * double(a[i]);
  return wide;
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

// What lies in the memory of a group of parameters.
struct Group {
  const int64_t *offsets;
  int64_t tensors;
  int threads;
};

// The learned momentum: `momenta` (decays, n) of type T, and its table.
template <typename T> struct Mixture {
  T *momenta;
  double *table;
  const double *decay;
  int64_t decays;
};

// The inner optimizer of the network's n logarithms, which stay within +-bound; SGD without moments.
template <typename T> struct Inner {
  T *theta, *mean, *square;
  T step_size, forget1, keep2, forget2, eps, bound;
};

// By value, here as below: what a store through a T * might change is read again for every number.
template <typename T> void learn(Inner<T> by, int64_t first, int64_t count, const T *__restrict slopes) {
  T *__restrict w = by.theta + first;
  if (by.mean == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      w[i] = std::clamp(w[i] - by.step_size * slopes[i], -by.bound, by.bound);
    return;
  }
  T *__restrict m = by.mean + first;
  T *__restrict v = by.square + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    m[i] += by.forget1 * (slopes[i] - m[i]);
    v[i] = by.keep2 * v[i] + by.forget2 * slopes[i] * slopes[i];
    w[i] = std::clamp(w[i] - by.step_size * m[i] / (std::sqrt(v[i]) + by.eps), -by.bound, by.bound);
  }
}

// The factor of tensor j in S^power.
template <typename T> T factor(const double *scale, int64_t j, double power, double largest) {
  return scale == nullptr ? T(1) : T(std::exp(std::clamp(power * scale[j], -largest, largest)));
}

// `lodo.mixture.Mixture.learn_` from the products <reply, momentum>, by decay and tensor.
template <typename T>
void learn_mixture(const Mixture<T> &mixture, std::vector<double> &products, int64_t tensors, double steps,
                   const Descent &by) {
  const std::vector<double> w = softmax(mixture.table, mixture.decays, tensors);
  std::vector<double> h(products.size());
  for (int64_t j = 0; j < tensors; ++j) {
    double mean = 0;
    for (int64_t b = 0; b < mixture.decays; ++b) {
      double &own = products[b * tensors + j];
      own /= 1 - std::pow(mixture.decay[b], steps);
      if (!std::isfinite(own)) own = 0;
      mean += w[b * tensors + j] * own;
    }
    for (int64_t b = 0; b < mixture.decays; ++b)
      h[b * tensors + j] = -w[b * tensors + j] * (products[b * tensors + j] - mean);
  }
  descend(mixture.table, mixture.decays * tensors, h.data(), by);
}

// Lines 1 and 2: the reply S^-1 gains g to a gradient teaches the mixture, and with the judged vector the network.
template <typename T>
void judge(const T *g, const T *gains, const T *judged, const double *scale, const Mixture<T> &mixture,
           const Inner<T> &inner, const Group &group, double steps, const Descent &by, T lr, double largest) {
  const Cut cut(group.offsets, group.tensors, group.threads);
  const int64_t n = group.offsets[group.tensors];
  std::vector<double> parts(cut.chunks.size() * mixture.decays), products(mixture.decays * group.tensors);
  cut.each([&](int64_t i, const Chunk &at) {
    T reply[kChunk];
    const int64_t count = at.end - at.first;
    const T inverse = factor<T>(scale, at.tensor, -1.0, largest);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) reply[k] = gains[at.first + k] * (inverse * g[at.first + k]);
    for (int64_t b = 0; b < mixture.decays; ++b)
      parts[i * mixture.decays + b] = dot(mixture.momenta + b * n + at.first, reply, count);
    if (inner.theta != nullptr) {
      const T minus_lr = -lr;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) reply[k] *= minus_lr * judged[at.first + k];
      learn(inner, at.first, count, reply);
    }
  });
  if (mixture.decays == 0) return;
  for (size_t i = 0; i < cut.chunks.size(); ++i)
    for (int64_t b = 0; b < mixture.decays; ++b)
      products[b * group.tensors + cut.chunks[i].tensor] += parts[i * mixture.decays + b];
  learn_mixture(mixture, products, group.tensors, steps, by);
}

// Adam's second moment v and its numbers; no moment without a base. `share` has one number for each tensor: where v is
// at most that share of its sum over the tensor it is rounding, and there is no gain.
template <typename T> struct Base {
  T *square;
  T weight, inverse_bias, eps;
  double inverse_unit, longest, momentum_bias;
  const double *share;
};

// v <- v + weight * (g^2 - v), unless g is null; returns the sum.
template <typename T> double take_in_square(T *__restrict v, const T *__restrict g, T weight, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    T sum = 0;
    if (g != nullptr) {
#pragma omp simd
      for (int64_t i = first; i < end; ++i) v[i] += weight * (g[i] * g[i] - v[i]);
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += v[i];
    total += double(sum);
  }
  return total;
}

// Multiplies S D into the gains.
template <typename T>
void complete(T *__restrict gains, Base<T> base, T scale, T floor, int64_t first, int64_t count) {
  if (base.square == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gains[i] *= scale;
    return;
  }
  const T *__restrict v = base.square + first;
  scale *= T(base.inverse_unit);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    gains[i] *= v[i] > floor ? scale / (std::sqrt(v[i] * base.inverse_bias) + base.eps) : T(0);
}

// momentum <- lerp(momentum, g, 1 - decay), by the one of two formulas that torch takes for it.
template <typename T> struct Forgetting {
  T keep, forget;
  bool is_most;

  explicit Forgetting(double decay) : keep(T(decay)), forget(T(1 - decay)), is_most(1 - decay >= 0.5) {}
  T operator()(T momentum, T g) const {
    return is_most ? g - keep * (g - momentum) : momentum + forget * (g - momentum);
  }
};

template <typename T>
void take_in(T *__restrict momentum, const T *__restrict g, Forgetting<T> forgetting, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) momentum[i] = forgetting(momentum[i], g[i]);
}

template <typename T>
void take_in_and_add(T *__restrict momentum, const T *__restrict g, Forgetting<T> forgetting, T *__restrict sum,
                     T share, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += share * (momentum[i] = forgetting(momentum[i], g[i]));
}

// e <- trace * e + m, unless that is null; step = lr * gains * m.
template <typename T>
void finish(T *__restrict e, T *__restrict step, const T *__restrict m, const T *__restrict gains, T trace, T lr,
            int64_t count) {
  if (e != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] = trace * e[i] + m[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) step[i] = lr * (gains[i] * m[i]);
}

// The weights of the mixture by decay and tensor, each over the momentum's correction for its start at zero.
template <typename T> std::vector<double> corrected(const Mixture<T> &mixture, int64_t tensors, double steps) {
  std::vector<double> w = softmax(mixture.table, mixture.decays, tensors);
  for (int64_t b = 0; b < mixture.decays; ++b)
    for (int64_t j = 0; j < tensors; ++j) w[b * tensors + j] /= 1 - std::pow(mixture.decay[b], steps);
  return w;
}

// Sums over each tensor of what its chunks have.
std::vector<double> by_tensor(const Cut &cut, const std::vector<double> &parts, int64_t tensors) {
  std::vector<double> sums(tensors);
  for (size_t i = 0; i < parts.size(); ++i) sums[cut.chunks[i].tensor] += parts[i];
  return sums;
}

// `lodo.bases.AdamBase.settle_`: raises v on tensors whose momentum has outgrown it; `squares` are the sums of v.
template <typename T>
void settle(const Base<T> &base, const Cut &cut, const std::vector<double> &momenta, std::vector<double> &squares) {
  std::vector<double> factors(squares.size(), 1.0);
  bool is_any = false;
  for (size_t j = 0; j < squares.size(); ++j) {
    const double bias = base.momentum_bias, most = base.longest * base.longest * squares[j] * base.inverse_bias;
    const double factor = momenta[j] / (bias * bias) / most;
    if (factor > 1 && std::isfinite(factor)) factors[j] = factor, is_any = true;
  }
  if (!is_any) return;
  std::vector<double> parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    const T factor = T(factors[at.tensor]);
    T *__restrict v = base.square + at.first;
    const int64_t count = at.end - at.first;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) v[k] *= factor;
    parts[i] = take_in_square<T>(v, nullptr, T(0), count);
  });
  squares = by_tensor(cut, parts, int64_t(squares.size()));
}

// Lines 3 and 4: a gradient goes into base and momentum, the momentum into its trace e, and the step is lr * gains * m.
// The gains come in as those of the network. Without a gradient they are completed, and that is all. Momenta of tensors
// that are `idle` decay at least as fast as `coast`.
template <typename T>
void advance(T *gains, const T *g, T *m, T *e, T *step, const double *scale, const Base<T> &base,
             const Mixture<T> &mixture, const Group &group, double steps, double beta, T trace, T lr, double largest,
             const uint8_t *idle, double coast) {
  const int64_t n = group.offsets[group.tensors];
  const bool is_mixed = g != nullptr && mixture.decays > 0;
  const std::vector<double> shares = is_mixed ? corrected(mixture, group.tensors, steps) : std::vector<double>();
  const Cut cut(group.offsets, group.tensors, group.threads);
  std::vector<double> square_parts(cut.chunks.size()), momentum_parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    const int64_t first = at.first, count = at.end - at.first;
    const T *from = g == nullptr ? nullptr : g + first;
    if (base.square != nullptr) square_parts[i] = take_in_square(base.square + first, from, base.weight, count);
    if (g == nullptr) return;
    T *__restrict mixed = m + first;
    if (mixture.decays == 0) {
      take_in(mixed, from, Forgetting<T>(beta), count);
    } else {
      std::fill(mixed, mixed + count, T(0));
    }
    const double most = idle != nullptr && idle[at.tensor] ? coast : 1.0;
    for (int64_t b = 0; b < mixture.decays; ++b)
      take_in_and_add(mixture.momenta + b * n + first, from, Forgetting<T>(std::min(mixture.decay[b], most)), mixed,
                      T(shares[b * group.tensors + at.tensor]), count);
    if (base.square != nullptr) momentum_parts[i] = energy<T>(mixed, count);
  });
  std::vector<double> squares = by_tensor(cut, square_parts, group.tensors);
  if (base.square != nullptr && g != nullptr) settle(base, cut, by_tensor(cut, momentum_parts, group.tensors), squares);
  cut.each([&](int64_t, const Chunk &at) {
    const int64_t first = at.first, count = at.end - at.first;
    const T floor = base.share == nullptr ? T(0) : T(base.share[at.tensor] * squares[at.tensor]);
    complete(gains + first, base, factor<T>(scale, at.tensor, 1.0, largest), floor, first, count);
    if (g != nullptr)
      finish(e == nullptr ? nullptr : e + first, step + first, m + first, gains + first, trace, lr, count);
  });
}

template <typename T>
void scale_learn(const T *g, const T *moves, double *table, double *levels, const Group &group, const Descent &by) {
  const Cut cut(group.offsets, group.tensors, group.threads);
  std::vector<double> parts(cut.chunks.size()), h(group.tensors);
  cut.each([&](int64_t i, const Chunk &at) { parts[i] = dot(g + at.first, moves + at.first, at.end - at.first); });
  for (size_t i = 0; i < cut.chunks.size(); ++i) h[cut.chunks[i].tensor] -= parts[i];
  descend(table, group.tensors, h.data(), by);
  for (int64_t j = 0; j < group.tensors; ++j) levels[1 + j] = std::max(levels[1 + j], levels[0] * std::exp(table[j]));
}

template <typename T> void energies(const T *g, double *sums, const Group &group) {
  const Cut cut(group.offsets, group.tensors, group.threads);
  std::vector<double> parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) { parts[i] = energy(g + at.first, at.end - at.first); });
  const std::vector<double> found = by_tensor(cut, parts, group.tensors);
  std::copy(found.begin(), found.end(), sums);
}

} // namespace

#define LODO_PARTS(T, SUFFIX)                                                                                          \
  extern "C" void lodo_judge_##SUFFIX(                                                                                 \
      const T *g, const T *gains, const T *judged, const double *scale, T *theta, T *mean, T *square, T *momenta,      \
      double *table, const double *decay, const int64_t *offsets, int64_t decays, int64_t tensors, int threads,        \
      double largest, double lr, double steps, double rate, double table_forget1, double table_forget2, double bias1,  \
      double bias2, double tiny, double bound, double step_size, double forget1, double keep2, double forget2,         \
      double eps, double theta_bound) {                                                                                \
    judge<T>(g, gains, judged, scale, {momenta, table, decay, decays},                                                 \
             {theta, mean, square, T(step_size), T(forget1), T(keep2), T(forget2), T(eps), T(theta_bound)},            \
             {offsets, tensors, threads}, steps, {rate, table_forget1, table_forget2, bias1, bias2, tiny, bound},      \
             T(lr), largest);                                                                                          \
  }                                                                                                                    \
  extern "C" void lodo_advance_##SUFFIX(                                                                               \
      T *gains, const T *g, T *m, T *e, T *step, const double *scale, T *square, const double *share,                  \
      const uint8_t *idle, T *momenta, double *table, const double *decay, const int64_t *offsets, int64_t decays,     \
      int64_t tensors, int threads, double largest, double steps, double weight, double bias, double eps, double unit, \
      double longest, double coast, double lr, double beta, double trace, double momentum_bias) {                      \
    advance<T>(gains, g, m, e, step, scale,                                                                            \
               {square, T(weight), T(1 / bias), T(eps), 1 / unit, longest, momentum_bias, share},                      \
               {momenta, table, decay, decays}, {offsets, tensors, threads}, steps, beta, T(trace), T(lr), largest,    \
               idle, coast);                                                                                           \
  }                                                                                                                    \
  extern "C" void lodo_scale_learn_##SUFFIX(                                                                           \
      const T *g, const T *moves, double *table, double *levels, const int64_t *offsets, int64_t tensors, int threads, \
      double rate, double forget1, double forget2, double bias1, double bias2, double tiny, double bound) {            \
    scale_learn<T>(g, moves, table, levels, {offsets, tensors, threads},                                               \
                   {rate, forget1, forget2, bias1, bias2, tiny, bound});                                               \
  }                                                                                                                    \
  extern "C" void lodo_energies_##SUFFIX(const T *g, double *sums, const int64_t *offsets, int64_t tensors,            \
                                         int threads) {                                                                \
    energies<T>(g, sums, {offsets, tensors, threads});                                                                 \
  }

LODO_PARTS(float, f32)
LODO_PARTS(double, f64)
