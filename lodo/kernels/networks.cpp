// CPU kernels of the networks that are more than a diagonal: the block-diagonal x permutation network,
// U = B_N P_N ... B_1 P_1, and at the end of this file that of LODO-Residuals.
//
// Built at run time by native.py and called through ctypes: plain C entry points, no torch headers. reference.py is
// the same arithmetic in torch and the ground truth for this file.
//
// Layouts (K = block size, W = number of blocks in a layer, D = K * W the padded dimension):
//   theta, moments   (N, K_in, K_out, W): lane w of every row is block w, so that the inner loops run over contiguous
//                    memory whatever K is. Theta and vectors are of type T, the moments of type M: T, Bfloat16, or
//                    void, which stands for the inner SGD.
//   vectors          "canonical": component o of block w at w * K + o. "planar": the same component at o * W + w.
//
// The perfect shuffle is free. Written in planar order, the output of a layer is, byte for byte, the canonical order of
// its shuffled self, which is what the next layer reads: P_l is a change of view and no data moves for it.
//
// No sum crosses a thread, so the results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>

namespace {

constexpr int64_t kTileBytes = 16384;      // K rows of lanes: a thread's four tiles fit the L2 cache, rows still stream
constexpr int64_t kMinPerThread = 1 << 14; // numbers of theta per layer that make a second thread worth waking
constexpr int kSpins = 2000;               // looks at a counter before a waiting thread offers its core to others

template <typename T> struct Network {
  T *theta;
  void *exp_avg, *exp_avg_sq;  // of type M
  const int32_t *permutations; // (N, D) canonical, or null: the perfect shuffle
  int64_t layers, block, width, size;
  int64_t dim() const { return block * width; }
  int64_t tile() const {
    const int64_t lanes = kTileBytes / int64_t(sizeof(T)) / block;
    return std::max<int64_t>(16, lanes / 16 * 16);
  }
  int64_t layer_numbers() const { return block * block * width; }
};

template <typename T> struct Rates { // see lodo/inner_optimizer.py
  T step_size, forget1, keep2, forget2, eps;
  uint32_t turn; // salts the stochastic rounding
};

int team_size(int64_t layer_numbers, int threads) {
#ifdef _OPENMP
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, layer_numbers / kMinPerThread)));
#else
  return 1;
#endif
}

// The tiles of one pass over a layer, shared by the threads of a team.
struct alignas(64) Pass {
  std::atomic<int64_t> taken{0}, done{0};
};

// A thread of the team. Passes follow one another: one begins when all tiles of the one before are done. Threads take
// tiles as they come and wait for tiles, not for each other, so that a thread which the system has put aside (a busy
// machine) holds up the others by one tile at most, where a barrier would hold them up in every layer.
class Worker {
public:
  Worker(Pass *passes, int team) : pass_(passes), team_(team) {}

  // Calls body(begin, lanes) for the tiles that this thread gets, and returns when all of them are done.
  template <typename Body> void for_tiles(int64_t width, int64_t tile, const Body &body) {
    const int64_t tiles = (width + tile - 1) / tile;
    if (team_ == 1) {
      for (int64_t begin = 0; begin < width; begin += tile) body(begin, std::min(tile, width - begin));
      return;
    }
    Pass &pass = *pass_++;
    for (int64_t i; (i = pass.taken.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      body(i * tile, std::min(tile, width - i * tile));
      pass.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; pass.done.load(std::memory_order_acquire) < tiles; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

private:
  Pass *pass_;
  int team_;
};

// Runs body(worker, scratch) on a team of threads; scratch is `numbers` numbers of each thread's own.
template <typename T, typename Body>
void run(const Network<T> &net, int64_t passes, int64_t numbers, int threads, const Body &body) {
  const int team = team_size(net.layer_numbers(), threads);
  std::unique_ptr<Pass[]> shared(team > 1 ? new Pass[passes] : nullptr);
#pragma omp parallel num_threads(team)
  {
    std::unique_ptr<T[]> scratch(new T[numbers]);
    Worker worker(shared.get(), team);
    body(worker, scratch.get());
  }
}

// ---- between canonical memory and tiles of rows -------------------------------------------------------------------

template <int K, typename T>
void split_fixed(const T *__restrict canonical, T *__restrict rows, int64_t stride, int64_t lanes, T scale) {
#pragma omp simd
  for (int64_t t = 0; t < lanes; ++t)
    for (int o = 0; o < K; ++o) rows[o * stride + t] = scale * canonical[t * K + o];
}

template <typename T>
void split(const T *canonical, T *rows, int64_t block, int64_t stride, int64_t lanes, T scale = 1) {
  switch (block) {
  case 2: return split_fixed<2>(canonical, rows, stride, lanes, scale);
  case 4: return split_fixed<4>(canonical, rows, stride, lanes, scale);
  case 8: return split_fixed<8>(canonical, rows, stride, lanes, scale);
  }
  for (int64_t o = 0; o < block; ++o)
    for (int64_t t = 0; t < lanes; ++t) rows[o * stride + t] = scale * canonical[t * block + o];
}

template <int K, typename T>
void merge_fixed(const T *__restrict rows, T *__restrict canonical, int64_t stride, int64_t lanes) {
#pragma omp simd
  for (int64_t t = 0; t < lanes; ++t)
    for (int o = 0; o < K; ++o) canonical[t * K + o] = rows[o * stride + t];
}

template <typename T> void merge(const T *rows, T *canonical, int64_t block, int64_t stride, int64_t lanes) {
  switch (block) {
  case 2: return merge_fixed<2>(rows, canonical, stride, lanes);
  case 4: return merge_fixed<4>(rows, canonical, stride, lanes);
  case 8: return merge_fixed<8>(rows, canonical, stride, lanes);
  }
  for (int64_t o = 0; o < block; ++o)
    for (int64_t t = 0; t < lanes; ++t) canonical[t * block + o] = rows[o * stride + t];
}

// ---- one tile of one layer ----------------------------------------------------------------------------------------

// y[o] = sum_i x[i] * B[i, o] (transposed = false), x[i] = sum_o B[i, o] * y[o] (transposed = true).
template <typename T>
void multiply(const T *theta, const Network<T> &net, int64_t begin, int64_t lanes, const T *from, int64_t from_stride,
              T *to, int64_t to_stride, bool transposed) {
  const int64_t K = net.block;
  for (int64_t r = 0; r < K; ++r) {
    T *__restrict out = to + r * to_stride;
    for (int64_t s = 0; s < K; ++s) {
      const T *__restrict b = theta + (transposed ? r * K + s : s * K + r) * net.width + begin;
      const T *__restrict in = from + s * from_stride;
      if (s == 0) {
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) out[t] = b[t] * in[t];
      } else {
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) out[t] += b[t] * in[t];
      }
    }
  }
}

// The same for two vectors at once, so that B is read once.
template <typename T>
void multiply_two(const T *theta, const Network<T> &net, int64_t begin, int64_t lanes, const T *from_a, const T *from_c,
                  int64_t from_stride, T *to_a, T *to_c, int64_t to_stride) {
  const int64_t K = net.block;
  for (int64_t o = 0; o < K; ++o) {
    T *__restrict ya = to_a + o * to_stride;
    T *__restrict yc = to_c + o * to_stride;
    for (int64_t i = 0; i < K; ++i) {
      const T *__restrict b = theta + (i * K + o) * net.width + begin;
      const T *__restrict a = from_a + i * from_stride;
      const T *__restrict c = from_c + i * from_stride;
      if (i == 0) {
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) ya[t] = b[t] * a[t], yc[t] = b[t] * c[t];
      } else {
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) ya[t] += b[t] * a[t], yc[t] += b[t] * c[t];
      }
    }
  }
}

// Moments in bfloat16 are rounded stochastically, as in lodo/rounding.py and with the same random bits.
struct Bfloat16 {
  uint16_t bits;
};

inline uint32_t random_word(uint32_t index, uint32_t turn) {
  uint32_t x = index ^ turn;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

template <typename T> inline T load(T moment) { return moment; }

inline float load(Bfloat16 moment) {
  const uint32_t word = uint32_t(moment.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// value, rounded up with the probability that 16 random bits give, where it is rounded at all.
template <typename T> inline void store(T &moment, T value, uint32_t) { moment = value; }

template <typename T> inline void store(Bfloat16 &moment, T value, uint32_t bits) {
  const float narrow = float(value);
  uint32_t word;
  std::memcpy(&word, &narrow, sizeof word);
  const bool is_nan = (word & 0x7FFFFFFFu) > 0x7F800000u; // to which adding bits could give any number
  moment.bits = is_nan ? uint16_t(0x7FC0) : uint16_t((word + bits) >> 16);
}

// One inner step of the number b of theta, at `place` there, along h.
template <typename T, typename M>
inline void adam(T &b, M &m, M &v, T h, const Rates<T> &r, int64_t place) {
  const T m0 = load(m);
  const T mt = m0 + r.forget1 * (h - m0);
  const T vt = r.keep2 * load(v) + r.forget2 * (h * h);
  b -= r.step_size * mt / (std::sqrt(vt) + r.eps);
  const uint32_t bits = random_word(uint32_t(place), r.turn); // only Bfloat16 uses it
  store(m, mt, bits & 0xFFFF);
  store(v, vt, bits >> 16);
}

// The heart of the step: per block, the hypergradient h = a d^T + c e^T, the inner update of B with it, and the
// back-propagated d <- B d, e <- B e with the B from before the update, in one pass over B and its moments.
template <typename T, typename M>
void learn_tile(const Network<T> &net, int64_t offset, const Rates<T> &rates, int64_t lanes, const T *a, const T *c,
                int64_t ac_stride, const T *d, const T *e, int64_t de_stride, T *back_d, T *back_e,
                int64_t back_stride) {
  const int64_t K = net.block;
  const Rates<T> r = rates;
  for (int64_t i = 0; i < K; ++i) {
    const T *__restrict ai = a + i * ac_stride;
    const T *__restrict ci = c + i * ac_stride;
    T *__restrict bd = back_d + i * back_stride;
    T *__restrict be = back_e + i * back_stride;
    for (int64_t t = 0; t < lanes; ++t) bd[t] = be[t] = 0;
    for (int64_t o = 0; o < K; ++o) {
      const T *__restrict dd = d + o * de_stride;
      const T *__restrict ee = e + o * de_stride;
      const int64_t row = offset + (i * K + o) * net.width;
      T *__restrict b = net.theta + row;
      if constexpr (!std::is_void_v<M>) {
        M *__restrict m = static_cast<M *>(net.exp_avg) + row;
        M *__restrict v = static_cast<M *>(net.exp_avg_sq) + row;
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) {
          const T h = ai[t] * dd[t] + ci[t] * ee[t];
          bd[t] += b[t] * dd[t];
          be[t] += b[t] * ee[t];
          adam(b[t], m[t], v[t], h, r, row + t);
        }
      } else {
#pragma omp simd
        for (int64_t t = 0; t < lanes; ++t) {
          const T h = ai[t] * dd[t] + ci[t] * ee[t];
          bd[t] += b[t] * dd[t];
          be[t] += b[t] * ee[t];
          b[t] -= r.step_size * h;
        }
      }
    }
  }
}

template <typename T> using LearnTile = decltype(&learn_tile<T, T>); // whatever the type of the moments

// ---- perfect shuffle ----------------------------------------------------------------------------------------------

// Zero-pads v and applies the first shuffle; `from_network` below is the transpose of the two.
template <typename T> void into_network(Worker &worker, const Network<T> &net, const T *v, T *to) {
  const int64_t K = net.block;
  worker.for_tiles(net.width, net.tile(), [&](int64_t begin, int64_t lanes) {
    const int64_t whole = std::max<int64_t>(0, std::min(lanes, net.size / K - begin));
    split(v + begin * K, to + begin, K, net.width, whole);
    for (int64_t w = begin + whole; w < begin + lanes; ++w)
      for (int64_t o = 0; o < K; ++o) to[o * net.width + w] = w * K + o < net.size ? v[w * K + o] : T(0);
  });
}

template <typename T> void from_network(Worker &worker, const Network<T> &net, const T *from, T *v) {
  const int64_t K = net.block;
  worker.for_tiles(net.width, net.tile(), [&](int64_t begin, int64_t lanes) {
    const int64_t whole = std::max<int64_t>(0, std::min(lanes, net.size / K - begin));
    merge(from + begin, v + begin * K, K, net.width, whole);
    for (int64_t j = (begin + whole) * K; j < std::min(net.size, (begin + lanes) * K); ++j)
      v[j] = from[j % K * net.width + j / K];
  });
}

template <typename T>
void matvec_shuffle(Worker &worker, const Network<T> &net, const T *v, T *out, T *work, T *scratch) {
  const int64_t K = net.block, D = net.dim(), tile = net.tile();
  T *x = work, *y = work + D;
  into_network(worker, net, v, x);
  for (int64_t l = 0; l < net.layers; ++l, std::swap(x, y))
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      split(x + begin * K, scratch, K, tile, lanes);
      multiply(net.theta + l * net.layer_numbers(), net, begin, lanes, scratch, tile, y + begin, net.width, false);
    });
  for (int64_t l = net.layers; l-- > 0; std::swap(x, y))
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      multiply(net.theta + l * net.layer_numbers(), net, begin, lanes, x + begin, net.width, scratch, tile, true);
      merge(scratch, y + begin * K, K, tile, lanes);
    });
  from_network(worker, net, x, out);
}

// work: one slot of two vectors for the input of each layer and one for the output of the last. Going back, the slot
// of a layer's input takes that layer's back-propagated pair: the memory order is the one the layer below expects.
template <typename T>
void learn_shuffle(Worker &worker, const Network<T> &net, const T *g, const T *m, T minus_lr, const Rates<T> &rates,
                   LearnTile<T> learn_tile, T *work, T *scratch) {
  const int64_t K = net.block, D = net.dim(), tile = net.tile(), area = K * tile;
  T *a = scratch, *c = a + area, *back_d = c + area, *back_e = back_d + area;
  into_network(worker, net, g, work);
  into_network(worker, net, m, work + D);
  for (int64_t l = 0; l < net.layers; ++l)
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      T *x = work + 2 * D * l, *y = x + 2 * D;
      split(x + begin * K, a, K, tile, lanes);
      split(x + D + begin * K, c, K, tile, lanes);
      multiply_two(net.theta + l * net.layer_numbers(), net, begin, lanes, a, c, tile, y + begin, y + D + begin,
                   net.width);
    });
  for (int64_t l = net.layers; l-- > 0;)
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      T *x = work + 2 * D * l, *y = x + 2 * D;
      const bool top = l == net.layers - 1; // where d comes from U m and e from U g
      split(x + begin * K, a, K, tile, lanes, minus_lr);
      split(x + D + begin * K, c, K, tile, lanes, minus_lr);
      learn_tile(net, l * net.layer_numbers() + begin, rates, lanes, a, c, tile, y + (top ? D : 0) + begin,
                 y + (top ? 0 : D) + begin, net.width, back_d, back_e, tile);
      if (l > 0) {
        merge(back_d, x + begin * K, K, tile, lanes);
        merge(back_e, x + D + begin * K, K, tile, lanes);
      }
    });
}

// ---- permutations given as indices --------------------------------------------------------------------------------
// Two vectors travel as pairs (2 numbers side by side, canonical order), so that one random access moves both.

template <typename T>
void matvec_indexed(Worker &worker, const Network<T> &net, const T *v, T *out, T *work, T *scratch) {
  const int64_t K = net.block, D = net.dim(), tile = net.tile();
  T *x = work, *y = work + D, *rows_in = scratch, *rows_out = scratch + K * tile;
  worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin * K; j < (begin + lanes) * K; ++j) x[j] = j < net.size ? v[j] : T(0);
  });
  for (int64_t l = 0; l < net.layers; ++l, std::swap(x, y))
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      const int32_t *perm = net.permutations + l * D + begin * K;
      for (int64_t t = 0; t < lanes; ++t)
        for (int64_t i = 0; i < K; ++i) rows_in[i * tile + t] = x[perm[t * K + i]];
      multiply(net.theta + l * net.layer_numbers(), net, begin, lanes, rows_in, tile, rows_out, tile, false);
      merge(rows_out, y + begin * K, K, tile, lanes);
    });
  for (int64_t l = net.layers; l-- > 0; std::swap(x, y))
    worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
      const int32_t *perm = net.permutations + l * D + begin * K;
      split(x + begin * K, rows_in, K, tile, lanes);
      multiply(net.theta + l * net.layer_numbers(), net, begin, lanes, rows_in, tile, rows_out, tile, true);
      for (int64_t t = 0; t < lanes; ++t)
        for (int64_t i = 0; i < K; ++i) y[perm[t * K + i]] = rows_out[i * tile + t];
    });
  worker.for_tiles(net.width, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin * K; j < std::min(net.size, (begin + lanes) * K); ++j) out[j] = x[j];
  });
}

// work: a planar slot of two vectors for the permuted input of each layer, then two buffers of pairs.
template <typename T>
void learn_indexed(Worker &worker, const Network<T> &net, const T *g, const T *m, T minus_lr, const Rates<T> &rates,
                   LearnTile<T> learn_tile, T *work, T *scratch) {
  const int64_t K = net.block, W = net.width, D = net.dim(), tile = net.tile(), area = K * tile;
  T *p = scratch, *q = p + area, *back_d = q + area, *back_e = back_d + area;
  T *x = work + 2 * D * net.layers, *y = x + 2 * D;
  worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin * K; j < (begin + lanes) * K; ++j) {
      x[2 * j] = j < net.size ? g[j] : T(0);
      x[2 * j + 1] = j < net.size ? m[j] : T(0);
    }
  });
  for (int64_t l = 0; l < net.layers; ++l, std::swap(x, y))
    worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
      const int32_t *perm = net.permutations + l * D + begin * K;
      T *a = work + 2 * D * l + begin, *c = a + D;
      for (int64_t t = 0; t < lanes; ++t)
        for (int64_t i = 0; i < K; ++i) {
          const T *pair = x + 2 * int64_t(perm[t * K + i]);
          a[i * W + t] = pair[0];
          c[i * W + t] = pair[1];
        }
      multiply_two(net.theta + l * net.layer_numbers(), net, begin, lanes, a, c, W, p, q, tile);
      for (int64_t t = 0; t < lanes; ++t)
        for (int64_t o = 0; o < K; ++o) {
          T *pair = y + 2 * ((begin + t) * K + o);
          pair[0] = p[o * tile + t];
          pair[1] = q[o * tile + t];
        }
    });
  for (int64_t l = net.layers; l-- > 0; std::swap(x, y))
    worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
      const int32_t *perm = net.permutations + l * D + begin * K;
      const T *a = work + 2 * D * l + begin, *c = a + D;
      const bool top = l == net.layers - 1; // where d comes from U m and e from U g
      for (int64_t t = 0; t < lanes; ++t)
        for (int64_t o = 0; o < K; ++o) {
          const T *pair = x + 2 * ((begin + t) * K + o);
          p[o * tile + t] = top ? minus_lr * pair[1] : pair[0];
          q[o * tile + t] = top ? minus_lr * pair[0] : pair[1];
        }
      learn_tile(net, l * net.layer_numbers() + begin, rates, lanes, a, c, W, p, q, tile, back_d, back_e, tile);
      if (l > 0)
        for (int64_t t = 0; t < lanes; ++t)
          for (int64_t i = 0; i < K; ++i) {
            T *pair = y + 2 * int64_t(perm[t * K + i]);
            pair[0] = back_d[i * tile + t];
            pair[1] = back_e[i * tile + t];
          }
    });
}

template <typename T> void matvec(const Network<T> &net, const T *v, T *out, T *work, int threads) {
  run(net, 2 * net.layers + 2, 2 * net.block * net.tile(), threads, [&](Worker &worker, T *scratch) {
    if (net.permutations) matvec_indexed(worker, net, v, out, work, scratch);
    else matvec_shuffle(worker, net, v, out, work, scratch);
  });
}

template <typename T>
void learn(const Network<T> &net, const T *g, const T *m, T lr, const Rates<T> &rates, LearnTile<T> learn_tile, T *work,
           int threads) {
  run(net, 2 * net.layers + 2, 4 * net.block * net.tile(), threads, [&](Worker &worker, T *scratch) {
    if (net.permutations) learn_indexed(worker, net, g, m, -lr, rates, learn_tile, work, scratch);
    else learn_shuffle(worker, net, g, m, -lr, rates, learn_tile, work, scratch);
  });
}

// ---- LODO-Residuals -----------------------------------------------------------------------------------------------
// The operator is E^T A_1^T .. A_N^T D A_N .. A_1 E with A_l z = z + w_l * z[perm_l]. It is seen as a network of blocks
// of one number, except that theta is (N + 1, W): w_1 .. w_N, then D. To learn, vectors travel as pairs here too.

template <typename T>
void matvec_residual(Worker &worker, const Network<T> &net, const T *v, T *out, T *work) {
  const int64_t W = net.width, tile = net.tile();
  T *x = work, *y = work + W;
  worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin; j < begin + lanes; ++j) x[j] = j < net.size ? v[j] : T(0);
  });
  for (int64_t l = 0; l < net.layers; ++l, std::swap(x, y))
    worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
      const T *w = net.theta + l * W;
      const int32_t *perm = net.permutations + l * W;
      for (int64_t j = begin; j < begin + lanes; ++j) y[j] = x[j] + w[j] * x[perm[j]];
    });
  worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
    const T *diagonal = net.theta + net.layers * W;
    for (int64_t j = begin; j < begin + lanes; ++j) x[j] *= diagonal[j];
  });
  for (int64_t l = net.layers; l-- > 0; std::swap(x, y))
    worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
      const T *w = net.theta + l * W;
      const int32_t *perm = net.permutations + l * W;
      for (int64_t j = begin; j < begin + lanes; ++j) y[perm[j]] = x[perm[j]] + w[j] * x[j];
    });
  worker.for_tiles(net.size, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin; j < begin + lanes; ++j) out[j] = x[j];
  });
}

// One inner step of `lanes` numbers of theta from `offset` on, along h.
template <typename T, typename M>
void update_tile(const Network<T> &net, int64_t offset, int64_t lanes, const Rates<T> &rates, const T *__restrict h) {
  const Rates<T> r = rates;
  T *__restrict b = net.theta + offset;
  if constexpr (!std::is_void_v<M>) {
    M *__restrict m = static_cast<M *>(net.exp_avg) + offset;
    M *__restrict v = static_cast<M *>(net.exp_avg_sq) + offset;
#pragma omp simd
    for (int64_t t = 0; t < lanes; ++t) adam(b[t], m[t], v[t], h[t], r, offset + t);
  } else {
#pragma omp simd
    for (int64_t t = 0; t < lanes; ++t) b[t] -= r.step_size * h[t];
  }
}

template <typename T> using UpdateTile = decltype(&update_tile<T, T>); // whatever the type of the moments

// As in reference.py: going back, the inputs of a stretch of layers are made again from that of its first, so that the
// inputs of all layers, twice theta's size, never exist together.
//
// work: slots of one vector of pairs each, layers / stretch + 1 for the inputs of stretches and stretch - 1 for those
// within one, then two for the pairs that go back. The output of the last layer has the slot that the input of one more
// would have.
template <typename T>
void learn_residual(Worker &worker, const Network<T> &net, const T *g, const T *m, T minus_lr, const Rates<T> &rates,
                    UpdateTile<T> update_tile, int64_t stretch, T *work, T *h) {
  const int64_t N = net.layers, W = net.width, tile = net.tile();
  T *within = work + 2 * W * (N / stretch + 1), *back = within + 2 * W * (stretch - 1), *next = back + 2 * W;
  const auto input = [&](int64_t l) {
    return l % stretch == 0 ? work + 2 * W * (l / stretch) : within + 2 * W * (l % stretch - 1);
  };
  const auto forward = [&](int64_t first, int64_t end) {
    for (int64_t l = first; l < end; ++l)
      worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
        const T *w = net.theta + l * W, *x = input(l);
        const int32_t *perm = net.permutations + l * W;
        T *y = input(l + 1);
        for (int64_t j = begin; j < begin + lanes; ++j) {
          const T *pair = x + 2 * int64_t(perm[j]);
          y[2 * j] = x[2 * j] + w[j] * pair[0];
          y[2 * j + 1] = x[2 * j + 1] + w[j] * pair[1];
        }
      });
  };
  worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
    for (int64_t j = begin; j < begin + lanes; ++j) {
      work[2 * j] = j < net.size ? g[j] : T(0);
      work[2 * j + 1] = j < net.size ? m[j] : T(0);
    }
  });
  forward(0, N);
  worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
    const T *diagonal = net.theta + N * W + begin, *x = input(N) + 2 * begin;
    T *b = back + 2 * begin;
    for (int64_t t = 0; t < lanes; ++t) {
      h[t] = minus_lr * x[2 * t] * x[2 * t + 1];
      b[2 * t] = minus_lr * diagonal[t] * x[2 * t + 1]; // what meets g's side comes from U m
      b[2 * t + 1] = minus_lr * diagonal[t] * x[2 * t];
    }
    update_tile(net, N * W + begin, lanes, rates, h);
  });
  for (int64_t l = N; l-- > 0; std::swap(back, next)) {
    if ((l + 1) % stretch == 0 && l + 1 < N) forward(l + 1 - stretch, l);
    worker.for_tiles(W, tile, [&](int64_t begin, int64_t lanes) {
      const T *w = net.theta + l * W + begin, *x = input(l), *b = back + 2 * begin;
      const int32_t *perm = net.permutations + l * W + begin;
      for (int64_t t = 0; t < lanes; ++t) {
        const int64_t place = 2 * int64_t(perm[t]);
        h[t] = x[place] * b[2 * t] + x[place + 1] * b[2 * t + 1];
        next[place] = back[place] + w[t] * b[2 * t];
        next[place + 1] = back[place + 1] + w[t] * b[2 * t + 1];
      }
      update_tile(net, l * W + begin, lanes, rates, h);
    });
  }
}

// A vector into a bfloat16 one, by the random words of minus the count (see round_into_ in reference.py).
template <typename T> void round_into(Bfloat16 *to, const T *values, int64_t size, uint32_t turn, int threads) {
  const int team = team_size(size, threads);
#pragma omp parallel for simd num_threads(team)
  for (int64_t j = 0; j < size; ++j) store(to[j], values[j], random_word(uint32_t(j), turn) & 0xFFFFu);
}

uint32_t turn_of(int64_t count) { return uint32_t(count) * 0x9E3779B1u; }

} // namespace

// `Network` of lodo/kernels/structures.py. work: 2 * D numbers (matvec, residual_matvec), 2 * D * (layers + 2) (learn;
// layers + 1 for the shuffle) or 2 * D * (layers / stretch + stretch + 2) (residual_learn).
struct Arguments {
  void *theta, *exp_avg, *exp_avg_sq;
  const int32_t *permutations;
  void *work;
  int64_t layers, block, width, size, threads, is_bfloat16;
  double lr, step_size, forget1, keep2, forget2, count, eps;
};

template <typename T> static Network<T> network(const Arguments &at) {
  return {static_cast<T *>(at.theta), at.exp_avg, at.exp_avg_sq, at.permutations, at.layers, at.block, at.width, at.size};
}

template <typename T> static Rates<T> inner_rates(const Arguments &at) {
  return {T(at.step_size), T(at.forget1), T(at.keep2), T(at.forget2), T(at.eps), turn_of(int64_t(at.count))};
}

#define LODO_ENTRY_POINTS(T, SUFFIX)                                                                                   \
  extern "C" void lodo_matvec_##SUFFIX(const Arguments *at, const T *v, T *out) {                                      \
    matvec(network<T>(*at), v, out, static_cast<T *>(at->work), int(at->threads));                                     \
  }                                                                                                                    \
  extern "C" void lodo_learn_##SUFFIX(const Arguments *at, const T *g, const T *m) {                                   \
    const auto tile = !at->exp_avg      ? learn_tile<T, void>                                                          \
                      : at->is_bfloat16 ? learn_tile<T, Bfloat16>                                                      \
                                        : learn_tile<T, T>;                                                            \
    learn<T>(network<T>(*at), g, m, T(at->lr), inner_rates<T>(*at), tile, static_cast<T *>(at->work),                  \
             int(at->threads));                                                                                        \
  }                                                                                                                    \
  extern "C" void lodo_residual_matvec_##SUFFIX(const Arguments *at, const T *v, T *out) {                             \
    const auto net = network<T>(*at);                                                                                  \
    run(net, 2 * net.layers + 3, 0, int(at->threads), [&](Worker &worker, T *) {                                       \
      matvec_residual(worker, net, v, out, static_cast<T *>(at->work));                                                \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void lodo_residual_learn_##SUFFIX(const Arguments *at, const T *g, const T *m, int64_t stretch) {         \
    const auto net = network<T>(*at);                                                                                  \
    const auto rates = inner_rates<T>(*at);                                                                            \
    const auto tile = !at->exp_avg      ? update_tile<T, void>                                                         \
                      : at->is_bfloat16 ? update_tile<T, Bfloat16>                                                     \
                                        : update_tile<T, T>;                                                           \
    run(net, 3 * net.layers + 2, net.tile(), int(at->threads), [&](Worker &worker, T *h) {                             \
      learn_residual<T>(worker, net, g, m, -T(at->lr), rates, tile, stretch, static_cast<T *>(at->work), h);           \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void lodo_round_##SUFFIX(void *to, const T *values, int64_t size, int64_t count, int threads) {           \
    round_into(static_cast<Bfloat16 *>(to), values, size, turn_of(-count), threads);                                   \
  }

LODO_ENTRY_POINTS(float, f32)
LODO_ENTRY_POINTS(double, f64)

extern "C" int64_t lodo_size_of_network() { return sizeof(Arguments); }
