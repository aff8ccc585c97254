// CPU kernels of the step whose G is diagonal (lodo/update/fused.py): one pass over memory for lines 1 and 2 of
// Algorithm 1, two for lines 3 and 4, and no call for each parameter of a group.
//
// Built with networks.cpp by native.py and called through ctypes. The plain form is lodo/update/plain.py with
// what it calls in lodo/parts, lodo/preconditioners/log_diagonal.py and, for what moves the small tables,
// `lodo.inner_optimizer.descend_`. Pointers are null for parts that there are not.
//
// Vectors of n numbers of type T are cut into the k parameters of a group by `offsets` (k + 1). Tables are of doubles,
// one parameter after the other. Sums are over chunks, whose results are added in order: they do not depend on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kChunk = 2048;           // numbers of a tensor that a thread takes at a time: they fit in its cache
constexpr int64_t kBlock = 256;            // of these, products that are added in their own precision
constexpr int64_t kMinPerThread = 1 << 15; // numbers that make a second thread worth waking

// The numbers of a step of `lodo.inner_optimizer.descend_`.
struct Descent {
  double rate, forget1, forget2, bias1, bias2;
};

// The numbers of a step of the inner optimizer. Declared again, field by field, in lodo/kernels/structures.py; so are
// Cohort and Group, whose sizes native.py compares.
struct Rates {
  double step_size, forget1, keep2, forget2;
};

struct Cohort {
  double active, steps, lr, last_lr, peak_lr;
  Rates inner;
  double beta, trace_decay, momentum_bias;
  double square_weight, square_bias, inverse_unit;
  Descent scale, mixture;
  double steps_behind;
  double step_weight, brake;
};

struct Group {
  const int64_t *offsets;
  const int32_t *cohort;
  int64_t parameters, threads;
  double tiny;
  const void *gradient;
  void *momentum, *step, *diagonal, *trace;
  const uint8_t *idle;
  void *theta, *theta_mean, *theta_square;
  double theta_eps, largest_theta;
  void *square;
  const double *shares;
  double eps, longest;
  double *scale, *scale_peak;
  const void *step_trace;
  double largest_log_scale;
  double *progress;
  double clear, sure, clear_fall, least;
  void *momenta;
  double *mixture;
  const double *decays;
  int64_t decay_count;
  double coast, largest_logit;
  double *recent_energy;
  double recent_weight, long_momentum;
  int64_t judges_step;
};

struct Chunk {
  int64_t tensor, first, end;
};

// The vector of a group, cut at the parameters and within them.
struct Cut {
  std::vector<Chunk> chunks;
  int team = 1;

  explicit Cut(const Group &group) : Cut(group.offsets, group.parameters, group.threads) {}

  Cut(const int64_t *offsets, int64_t tensors, int64_t threads) {
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

// A step of a table: `count` numbers of a parameter, their means and their squares, one after the other.
void descend(double *table, int64_t count, const double *slopes, const Descent &by, double tiny, double bound) {
  double *u = table, *mean = table + count, *square = table + 2 * count;
  const double largest = 0.5 * std::sqrt(std::numeric_limits<double>::max());
  for (int64_t i = 0; i < count; ++i) {
    const double h = std::isfinite(slopes[i]) ? std::clamp(slopes[i], -largest, largest) : 0.0;
    mean[i] += by.forget1 * (h - mean[i]);
    square[i] += by.forget2 * (h * h - square[i]);
    u[i] -= by.rate * (mean[i] / by.bias1) / (std::sqrt(square[i] / by.bias2) + tiny);
    u[i] = std::clamp(u[i], -bound, bound);
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

// The softmax of the weights of a parameter, as torch computes it.
void softmax(const double *u, double *w, int64_t decays) {
  double top = u[0], sum = 0;
  for (int64_t b = 1; b < decays; ++b) top = std::max(top, u[b]);
  for (int64_t b = 0; b < decays; ++b) sum += w[b] = std::exp(u[b] - top);
  for (int64_t b = 0; b < decays; ++b) w[b] /= sum;
}

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

// The factor of parameter j in S^power.
template <typename T> T factor(const Group &group, int64_t j, double power) {
  if (group.scale == nullptr) return T(1);
  return T(std::exp(std::clamp(power * group.scale[3 * j], -group.largest_log_scale, group.largest_log_scale)));
}

// `lodo.parts.mixture.Mixture.learn_from_response_` for a parameter, from its products <response, momentum>.
void learn_mixture(const Group &group, const Cohort &by, int64_t j, double *products) {
  const int64_t decays = group.decay_count;
  double *table = group.mixture + 3 * decays * j;
  std::vector<double> w(decays), h(decays);
  softmax(table, w.data(), decays);
  double mean = 0;
  for (int64_t b = 0; b < decays; ++b) {
    products[b] /= 1 - std::pow(group.decays[b], by.steps_behind);
    if (!std::isfinite(products[b])) products[b] = 0;
    mean += w[b] * products[b];
  }
  for (int64_t b = 0; b < decays; ++b) h[b] = -w[b] * (products[b] - mean);
  descend(table, decays, h.data(), by.mixture, group.tiny, group.largest_logit);
}

// `lodo.parts.tensor_scale.TensorScale.learn_from_step_` for a parameter, from <g, step>, <g, g> and <step, step>.
void learn_from_step(const Group &group, const Cohort &by, int64_t j, const double *products) {
  double &s = group.scale[3 * j], &progress = group.progress[j];
  const double size = std::sqrt(products[1]) * std::sqrt(products[2]);
  const double cosine = products[0] / size;
  if (by.step_weight > 0 && std::isfinite(cosine) && size > group.least) {
    progress += by.step_weight * (std::clamp(cosine, -1.0, 1.0) - progress);
    const double excess = std::max((-group.clear_fall - progress) / (1 - group.clear_fall), 0.0);
    s = std::clamp(s - by.brake * excess, -group.largest_log_scale, group.largest_log_scale);
  }
  group.scale_peak[j] = std::max(group.scale_peak[j], by.peak_lr * std::exp(s));
}

// What that learns from in a chunk.
template <typename T> void judge(const T *g, const T *step, int64_t count, double *products) {
  products[0] = dot(g, step, count);
  products[1] = energy(g, count);
  products[2] = energy(step, count);
}

// Lets all parameters learn from what `judge` found in the chunks.
void learn_from_steps(const Group &group, const Cohort *cohorts, const Cut &cut, const std::vector<double> &judged) {
  std::vector<double> products(3 * group.parameters);
  for (size_t i = 0; i < cut.chunks.size(); ++i)
    for (int64_t p = 0; p < 3; ++p) products[3 * cut.chunks[i].tensor + p] += judged[3 * i + p];
  for (int64_t j = 0; j < group.parameters; ++j)
    learn_from_step(group, cohorts[group.cohort[j]], j, products.data() + 3 * j);
}

// The same of a gradient and a step that are given.
template <typename T> void learn_step(const Group &group, const Cohort *cohorts, const T *g, const T *step) {
  if (group.scale == nullptr) return;
  const Cut cut(group);
  std::vector<double> judged(3 * cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    judge(g + at.first, step + at.first, at.end - at.first, judged.data() + 3 * i);
  });
  learn_from_steps(group, cohorts, cut, judged);
}

// Lines 1 and 2: a gradient and the last step teach the scales, the response S^-1 diagonal g to it the mixture, and with
// the judged vector the network.
template <typename T> void learn_all(const Group &group, const Cohort *cohorts, const T *g, const T *judged) {
  const Cut cut(group);
  const int64_t n = group.offsets[group.parameters], decays = group.decay_count;
  const T *diagonal = static_cast<const T *>(group.diagonal), *momenta = static_cast<const T *>(group.momenta);
  std::vector<double> parts(cut.chunks.size() * decays), products(decays * group.parameters);
  std::vector<double> judged_steps(3 * cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    const Cohort &by = cohorts[group.cohort[at.tensor]];
    if (by.active == 0) return;
    T response[kChunk];
    const int64_t count = at.end - at.first;
    if (group.judges_step != 0) {
      const T *m = static_cast<const T *>(group.momentum) + at.first;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) response[k] = diagonal[at.first + k] * m[k];
      judge(g + at.first, response, count, judged_steps.data() + 3 * i);
    }
    const T inverse = factor<T>(group, at.tensor, -1.0);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) response[k] = diagonal[at.first + k] * (inverse * g[at.first + k]);
    for (int64_t b = 0; b < decays; ++b) parts[i * decays + b] = dot(momenta + b * n + at.first, response, count);
    if (group.theta == nullptr) return;
    const T minus_lr = -T(by.last_lr);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) response[k] *= minus_lr * judged[at.first + k];
    const Rates &rates = by.inner;
    learn(Inner<T>{static_cast<T *>(group.theta), static_cast<T *>(group.theta_mean),
                   static_cast<T *>(group.theta_square), T(rates.step_size), T(rates.forget1), T(rates.keep2),
                   T(rates.forget2), T(group.theta_eps), T(group.largest_theta)},
          at.first, count, response);
  });
  if (group.judges_step != 0) learn_from_steps(group, cohorts, cut, judged_steps);
  if (decays == 0) return;
  for (size_t i = 0; i < cut.chunks.size(); ++i)
    for (int64_t b = 0; b < decays; ++b) products[cut.chunks[i].tensor * decays + b] += parts[i * decays + b];
  for (int64_t j = 0; j < group.parameters; ++j) {
    const Cohort &by = cohorts[group.cohort[j]];
    if (by.active != 0) learn_mixture(group, by, j, products.data() + decays * j);
  }
}

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

// Multiplies S D into the diagonal; v of at most `floor` is rounding, and has no gain.
template <typename T>
void complete(T *__restrict diagonal, const T *__restrict v, T scale, T inverse_bias, T eps, T floor, int64_t count) {
  if (v == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) diagonal[i] *= scale;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    diagonal[i] *= v[i] > floor ? scale / (std::sqrt(v[i] * inverse_bias) + eps) : T(0);
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
void take_in_and_add(T *__restrict momentum, const T *__restrict g, Forgetting<T> forgetting, T factor,
                     T *__restrict sum, T share, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += share * (momentum[i] = factor * forgetting(momentum[i], g[i]));
}

// e <- trace * e + m, unless e is null; step = lr * diagonal * m.
template <typename T>
void finish(T *__restrict e, T *__restrict step, const T *__restrict m, const T *__restrict diagonal, T trace, T lr,
            int64_t count) {
  if (e != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] = trace * e[i] + m[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) step[i] = lr * (diagonal[i] * m[i]);
}

// Sums over each tensor of what its chunks have.
std::vector<double> by_tensor(const Cut &cut, const std::vector<double> &parts, int64_t tensors) {
  std::vector<double> sums(tensors);
  for (size_t i = 0; i < parts.size(); ++i) sums[cut.chunks[i].tensor] += parts[i];
  return sums;
}

// `lodo.parts.second_moment.SecondMoment.follow_`: raises v on parameters whose momentum has outgrown it; `squares` are
// the sums of v.
template <typename T>
void follow(const Group &group, const Cohort *cohorts, const Cut &cut, const std::vector<double> &momenta,
            std::vector<double> &squares) {
  std::vector<double> factors(squares.size(), 1.0);
  bool is_any = false;
  for (size_t j = 0; j < squares.size(); ++j) {
    const Cohort &by = cohorts[group.cohort[j]];
    if (by.active == 0) continue;
    const double most = group.longest * group.longest * squares[j] * double(T(1 / by.square_bias));
    const double factor = momenta[j] / (by.momentum_bias * by.momentum_bias) / most;
    if (factor > 1 && std::isfinite(factor)) factors[j] = factor, is_any = true;
  }
  if (!is_any) return;
  std::vector<double> parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    const T factor = T(factors[at.tensor]);
    T *__restrict v = static_cast<T *>(group.square) + at.first;
    const int64_t count = at.end - at.first;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) v[k] *= factor;
    parts[i] = take_in_square<T>(v, nullptr, T(0), count);
  });
  squares = by_tensor(cut, parts, int64_t(squares.size()));
}

// `lodo.parts.mixture.Mixture._is_stale`: what each momentum of each parameter is to be multiplied by; takes the
// gradient into the energy of the recent ones.
template <typename T>
std::vector<double> coasting(const Group &group, const Cohort *cohorts, const Cut &cut, const T *g) {
  const int64_t n = group.offsets[group.parameters], decays = group.decay_count;
  std::vector<double> factors(decays * group.parameters, 1.0);
  if (decays == 0 || g == nullptr) return factors;
  const int64_t stride = decays + 1; // the momenta's energies, and the gradient's
  std::vector<double> parts(stride * cut.chunks.size()), sums(stride * group.parameters);
  cut.each([&](int64_t i, const Chunk &at) {
    const int64_t count = at.end - at.first;
    for (int64_t b = 0; b < decays; ++b)
      if (group.decays[b] > group.coast)
        parts[stride * i + b] = energy(static_cast<const T *>(group.momenta) + b * n + at.first, count);
    parts[stride * i + decays] = energy(g + at.first, count);
  });
  for (size_t i = 0; i < cut.chunks.size(); ++i)
    for (int64_t p = 0; p < stride; ++p) sums[stride * cut.chunks[i].tensor + p] += parts[stride * i + p];
  for (int64_t j = 0; j < group.parameters; ++j) {
    const Cohort &by = cohorts[group.cohort[j]];
    if (by.active == 0) continue;
    double &recent = group.recent_energy[j];
    recent += (recent == 0 ? 1.0 : group.recent_weight) * (sums[stride * j + decays] - recent);
    const bool is_idle = group.idle != nullptr && group.idle[j];
    for (int64_t b = 0; b < decays; ++b) {
      const double most = group.long_momentum * (1 - std::pow(group.decays[b], by.steps_behind));
      if (group.decays[b] > group.coast && (is_idle || sums[stride * j + b] > most * most * recent))
        factors[decays * j + b] = group.coast / group.decays[b];
    }
  }
  return factors;
}

// Line 3 for a chunk: a gradient goes into the momentum, or into the momenta and their mixture.
template <typename T>
void average(const Group &group, const Cohort &by, const Chunk &at, const T *g, const double *shares,
             const double *factors) {
  const int64_t n = group.offsets[group.parameters], first = at.first, count = at.end - at.first;
  T *__restrict m = static_cast<T *>(group.momentum) + first;
  if (group.decay_count == 0) {
    take_in(m, g + first, Forgetting<T>(by.beta), count);
    return;
  }
  std::fill(m, m + count, T(0));
  for (int64_t b = 0; b < group.decay_count; ++b)
    take_in_and_add(static_cast<T *>(group.momenta) + b * n + first, g + first, Forgetting<T>(group.decays[b]),
                    T(factors[b]), m, T(shares[b]), count);
}

// The weights of the mixtures, each over the momentum's correction for its start at zero, by parameter and decay.
std::vector<double> corrected(const Group &group, const Cohort *cohorts) {
  const int64_t decays = group.decay_count;
  std::vector<double> w(decays * group.parameters);
  for (int64_t j = 0; j < group.parameters && decays > 0; ++j) {
    softmax(group.mixture + 3 * decays * j, w.data() + decays * j, decays);
    for (int64_t b = 0; b < decays; ++b)
      w[decays * j + b] /= 1 - std::pow(group.decays[b], cohorts[group.cohort[j]].steps);
  }
  return w;
}

// Lines 3 and 4: a gradient goes into second moment and momentum, the momentum into its trace, and the step is
// lr * diagonal * m. The diagonal comes in as that of the network. Where the cohort is not active it is completed, and
// the step is zero.
template <typename T> void advance(const Group &group, const Cohort *cohorts) {
  const T *g = static_cast<const T *>(group.gradient);
  T *diagonal = static_cast<T *>(group.diagonal), *step = static_cast<T *>(group.step);
  T *trace = static_cast<T *>(group.trace), *square = static_cast<T *>(group.square);
  T *momentum = static_cast<T *>(group.momentum);
  const std::vector<double> shares = corrected(group, cohorts);
  const Cut cut(group);
  const std::vector<double> factors = coasting(group, cohorts, cut, g);
  std::vector<double> square_parts(cut.chunks.size()), momentum_parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) {
    const Cohort &by = cohorts[group.cohort[at.tensor]];
    const bool is_active = by.active != 0;
    const int64_t count = at.end - at.first;
    if (square != nullptr)
      square_parts[i] = take_in_square<T>(square + at.first, is_active ? g + at.first : nullptr, T(by.square_weight), count);
    if (!is_active) return;
    const int64_t row = group.decay_count * at.tensor;
    average<T>(group, by, at, g, shares.data() + row, factors.data() + row);
    if (square != nullptr) momentum_parts[i] = energy<T>(momentum + at.first, count);
  });
  std::vector<double> squares = by_tensor(cut, square_parts, group.parameters);
  if (square != nullptr) follow<T>(group, cohorts, cut, by_tensor(cut, momentum_parts, group.parameters), squares);
  cut.each([&](int64_t, const Chunk &at) {
    const Cohort &by = cohorts[group.cohort[at.tensor]];
    const int64_t first = at.first, count = at.end - at.first;
    const T floor = group.shares == nullptr ? T(0) : T(group.shares[at.tensor] * squares[at.tensor]);
    T scale = factor<T>(group, at.tensor, 1.0);
    if (square != nullptr) scale *= T(by.inverse_unit);
    complete<T>(diagonal + first, square == nullptr ? nullptr : square + first, scale, T(1 / by.square_bias), T(group.eps),
                floor, count);
    if (by.active != 0)
      finish<T>(trace == nullptr ? nullptr : trace + first, step + first, momentum + first, diagonal + first,
                T(by.trace_decay), T(by.lr), count);
    else if (step != nullptr)
      std::fill(step + first, step + first + count, T(0));
  });
}

// What parts learn from the gradient as it is: `lodo.parts.tensor_scale.TensorScale.learn_`.
template <typename T> void learn_parts(const Group &group, const Cohort *cohorts, const T *g) {
  if (group.scale == nullptr) return;
  const Cut cut(group);
  const T *trace = static_cast<const T *>(group.step_trace);
  std::vector<double> parts(cut.chunks.size()), h(group.parameters);
  cut.each([&](int64_t i, const Chunk &at) { parts[i] = dot(g + at.first, trace + at.first, at.end - at.first); });
  for (size_t i = 0; i < cut.chunks.size(); ++i) h[cut.chunks[i].tensor] -= parts[i];
  for (int64_t j = 0; j < group.parameters; ++j) {
    double &s = group.scale[3 * j];
    const double before = s;
    descend(&s, 1, &h[j], cohorts[group.cohort[j]].scale, group.tiny, group.largest_log_scale);
    const double doubt = 1 - std::clamp((group.progress[j] - group.clear) / (group.sure - group.clear), 0.0, 1.0);
    if (s < before && doubt < 1) s = before + doubt * (s - before);
  }
}

template <typename T> void energies(const Group &group, const T *g, double *sums) {
  const Cut cut(group);
  std::vector<double> parts(cut.chunks.size());
  cut.each([&](int64_t i, const Chunk &at) { parts[i] = energy(g + at.first, at.end - at.first); });
  const std::vector<double> found = by_tensor(cut, parts, group.parameters);
  std::copy(found.begin(), found.end(), sums);
}

} // namespace

#define LODO_PARTS(T, SUFFIX)                                                                                          \
  extern "C" void lodo_learn_all_##SUFFIX(const Group *group, const Cohort *cohorts, const T *g, const T *judged) {    \
    learn_all<T>(*group, cohorts, g, judged);                                                                          \
  }                                                                                                                    \
  extern "C" void lodo_advance_##SUFFIX(const Group *group, const Cohort *cohorts) { advance<T>(*group, cohorts); }    \
  extern "C" void lodo_learn_parts_##SUFFIX(const Group *group, const Cohort *cohorts, const T *g) {                   \
    learn_parts<T>(*group, cohorts, g);                                                                                \
  }                                                                                                                    \
  extern "C" void lodo_learn_step_##SUFFIX(const Group *group, const Cohort *cohorts, const T *g, const T *step) {      \
    learn_step<T>(*group, cohorts, g, step);                                                                           \
  }                                                                                                                    \
  extern "C" void lodo_energies_##SUFFIX(const Group *group, const T *g, double *sums) {                               \
    energies<T>(*group, g, sums);                                                                                      \
  }

LODO_PARTS(float, f32)
LODO_PARTS(double, f64)

extern "C" int64_t lodo_size_of_cohort() { return sizeof(Cohort); }
extern "C" int64_t lodo_size_of_group() { return sizeof(Group); }
