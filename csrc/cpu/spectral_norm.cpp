// Spectral norm on the CPU: the matrices' layout in memory and the distribution over threads. The inner loops are in
// spectral_norm.inl, once per instruction set.
//
// A weight, its dimensions sorted by stride, is an array (A, R, B) with the matrix's rows in the middle; its columns are the
// pairs (a, b). One power iteration reads it once. "Rows first" (q, then p, then q: torch's parametrization) takes a few rows
// at a time, forms p_r = w_r . q and adds p_r w_r to the new q while the rows are in cache. "Columns first" (torch's hook)
// takes tiles of columns over all rows and does the same the other way round. Where B is 1 the matrix is stored transposed,
// and the two change places.
//
// Weights are cut into stripes, whose number follows from the shape alone; stripes' sums are added in order. So results don't
// depend on the number of threads.
#include "../spectral_norm.h"
#include "blocks.h"
#include "scratch.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

namespace fastgan {
namespace {

constexpr int kTileBytes = 256;
constexpr int kWideBytes = 2048;

}  // namespace
}  // namespace fastgan

#define FASTGAN_SIMD_SOURCE "spectral_norm.inl"
#include "simd.h"

namespace fastgan {
namespace {

constexpr int64_t kStripe = 1 << 15;      // elements that are worth a task
constexpr int64_t kMaxStripes = 16;       // per weight: each has its own sums
constexpr int64_t kThreadsFrom = 1 << 16;  // elements below which one thread is faster
constexpr int64_t kTogether = 1 << 22;    // elements of weights that share a parallel region and have scratch space at once
constexpr int64_t kPastCaches = 1 << 21;  // elements above which results are written past the caches

// s and ds/dsigma.
struct Scale {
  Target target;

  bool active(double sigma) const { return target.at_most ? !(sigma <= target.value) : sigma != 0; }
  double value(double sigma) const { return active(sigma) ? target.value / sigma : 1; }
  double slope(double sigma) const { return active(sigma) ? -target.value / sigma / sigma : 0; }
};

// One weight. p belongs to the matrix's rows and q to its columns, in the order they have in memory.
struct Matrix {
  Tensor weight;  // dense
  int64_t A = 1, R = 1, B = 1;
  bool swapped = false;             // B was 1: rows and columns, and so u and v, have changed places
  std::vector<int64_t> v_position;  // where in v the column of each place in memory is; empty: in the same order

  int64_t columns() const { return A * B; }
  int64_t numel() const { return A * R * B; }
  bool past_caches() const { return numel() > kPastCaches; }
};

Matrix as_matrix(const Tensor& weight, const Tensor& result, int64_t dim) {
  Matrix m;
  m.weight = laid_out_as(weight, result);
  const int64_t dims = weight.dim();
  std::vector<int64_t> order(dims), others, logical;
  std::iota(order.begin(), order.end(), 0);
  // Dimensions of size 1 have strides without meaning, which a comparison can't order: leave them out.
  order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t d) { return weight.size(d) == 1 && d != dim; }), order.end());
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return result.stride(a) > result.stride(b); });
  bool before = true;
  for (int64_t d : order) {
    if (d == dim) {
      before = false;
      m.R = weight.size(d);
      continue;
    }
    (before ? m.A : m.B) *= weight.size(d);
    others.push_back(d);
  }
  if (m.R == 1) m.B *= m.A, m.A = 1;  // one row: where it stands among the dimensions means nothing
  for (int64_t d = 0; d < dims; ++d)
    if (d != dim && weight.size(d) != 1) logical.push_back(d);
  if (others != logical) {
    std::vector<int64_t> stride(dims, 0);
    int64_t next = 1;
    for (size_t i = logical.size(); i-- > 0; next *= weight.size(logical[i])) stride[logical[i]] = next;
    m.v_position.resize(m.columns());
    std::vector<int64_t> index(others.size(), 0);
    int64_t at = 0;
    for (int64_t& position : m.v_position) {
      position = at;
      for (size_t i = others.size(); i-- > 0;) {
        at += stride[others[i]];
        if (++index[i] < weight.size(others[i])) break;
        at -= stride[others[i]] * weight.size(others[i]);
        index[i] = 0;
      }
    }
  }
  if (m.B == 1 && m.A > 1) std::swap(m.A, m.R), std::swap(m.A, m.B), m.swapped = true;  // (A, R, 1) -> (1, A, R)
  return m;
}

template <class T> void load_vector(const T* in, int64_t count, const std::vector<int64_t>& position, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = position.empty() ? in[i] : in[position[i]];
}

template <class T> void store_vector(const T* in, int64_t count, const std::vector<int64_t>& position, T* out) {
  for (int64_t i = 0; i < count; ++i) out[position.empty() ? i : position[i]] = in[i];
}

// Memory that a thread keeps for its next call: fresh memory costs more than the arithmetic here.
template <class T> T* scratch(int64_t count) {
  thread_local Scratch<char> memory;
  thread_local int64_t bytes = 0;
  const int64_t wanted = count * int64_t(sizeof(T));
  if (wanted > bytes) {
    memory.reset();
    memory = allocate<char>(wanted);
    bytes = wanted;
  }
  return reinterpret_cast<T*>(memory.get());
}

int64_t round_up(int64_t count) { return (count + 15) / 16 * 16; }

// Layers go through phases, and a phase has parts that any thread may do. finish(phase) runs once they all are done, before
// any part of the layer's next phase.
class Progress {
 public:
  void start(int64_t parts) { left_.store(parts, std::memory_order_relaxed), finished_.store(0, std::memory_order_relaxed); }

  void wait_for(int64_t phase) const {
    for (int spins = 0; finished_.load(std::memory_order_acquire) < phase; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

  bool last_part() { return left_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

  void finished(int64_t phase, int64_t parts_of_next) {
    left_.store(parts_of_next, std::memory_order_relaxed);
    finished_.store(phase + 1, std::memory_order_release);
  }

 private:
  std::atomic<int64_t> left_{0}, finished_{0};
};

template <class Layer> struct Task {
  Layer* layer;
  Progress* progress;
  int64_t phase, part;
};

// Takes layers first to last through their phases in one parallel region, whose start costs as much as a small layer. One
// layer's second phase is done after the first of the next, so that threads find work while the last parts are done; a thread
// alone goes through it at once, while the caches hold the layer. Tasks are taken in the order of the list, and each waits for
// earlier ones only, which have been taken: so nothing hangs, however few threads come.
template <class Layer> void run_phases(std::vector<Layer>& layers, size_t first, size_t last, int64_t work) {
  const int64_t phases = layers[first].phases(), count = last - first;
  std::vector<Progress> progress(count);
  std::vector<Task<Layer>> tasks;
  for (int64_t i = 0; i < count; ++i) progress[i].start(layers[first + i].parts(0));
  const int64_t threads = work < kThreadsFrom ? 1 : torch::stable::get_num_threads();
  const int64_t lag = threads > 1 ? 1 : 0;
  for (int64_t slot = 0; slot < count + lag * (phases - 1); ++slot)
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t i = slot - lag * phase;
      if (i < 0 || i >= count) continue;
      Layer& layer = layers[first + i];
      const int64_t parts = layer.parts(phase);
      // Every other phase from the end: that is what the caches still hold.
      for (int64_t part = 0; part < parts; ++part) tasks.push_back({&layer, &progress[i], phase, phase % 2 ? parts - 1 - part : part});
    }
  std::atomic<size_t> next{0};
  const auto work_off = [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
      const auto& [layer, progress, phase, part] = tasks[i];
      progress->wait_for(phase);
      layer->run(phase, part);
      if (progress->last_part()) {
        layer->finish(phase);
        progress->finished(phase, phase + 1 < phases ? layer->parts(phase + 1) : 0);
      }
    }
  };
  if (threads == 1)
    work_off(0, 1);
  else
    torch::stable::parallel_for(0, std::min<int64_t>(tasks.size(), threads), 1, work_off);
}

template <class S> struct Forward {
  using T = typename AccumulateIn<S>::Type;
  static constexpr bool direct = std::is_same_v<S, T>;

  Matrix m;
  Tensor result, new_u, new_v;
  const T *u, *v;
  T *sigma_out;
  Iteration iteration;
  Scale scale;
  bool rows_first;
  int64_t stripes, lanes;
  T *p, *q;           // current vectors
  T *row_sums, *column_sums;  // per stripe: see the constructor
  double sigma = 0;

  Forward(Matrix matrix, Tensor result, Tensor new_u, Tensor new_v, const T* u, const T* v, T* sigma_out, Iteration iteration, Scale scale)
      : m(std::move(matrix)), result(result), new_u(new_u), new_v(new_v), u(u), v(v), sigma_out(sigma_out), iteration(iteration), scale(scale) {
    rows_first = iteration.count == 0 || iteration.v_first == m.swapped;
    lanes = FASTGAN_FOR_ISA(lanes<T>)();
    const int64_t units = rows_first ? m.R / 4 : m.A * tiles_across();
    stripes = std::max<int64_t>(1, std::min({kMaxStripes, m.numel() / kStripe, units}));
  }

  // Floats of scratch: p, q, and sums over rows and over columns, one side of them per stripe.
  int64_t row_room() const { return round_up(m.R) * (rows_first ? 1 : lanes * stripes); }
  int64_t column_room() const { return round_up(m.columns()) * (rows_first ? stripes : 1); }
  int64_t room() const { return round_up(m.R) + round_up(m.columns()) + row_room() + column_room(); }

  void begin(T* memory) {
    p = memory, q = p + round_up(m.R);
    row_sums = q + round_up(m.columns()), column_sums = row_sums + row_room();
    load_vector(m.swapped ? v : u, m.R, m.swapped ? m.v_position : none(), p);
    load_vector(m.swapped ? u : v, m.columns(), m.swapped ? none() : m.v_position, q);
  }

  static const std::vector<int64_t>& none() {
    static const std::vector<int64_t> empty;
    return empty;
  }

  // Wide where memory is read in place, if that leaves tiles enough to share out.
  int64_t tile_width() const {
    const int64_t narrow = kTileBytes / sizeof(T), wide = kWideBytes / sizeof(T);
    return direct ? std::clamp(m.B / 8 / narrow * narrow, narrow, wide) : narrow;
  }
  int64_t tiles_across() const { return (m.B + tile_width() - 1) / tile_width(); }
  const S* data() const { return static_cast<const S*>(m.weight.const_data_ptr()); }

  // A power iteration each (or, without any, sigma's product), then the result.
  int64_t phases() const { return steps() + iteration.write; }
  int64_t steps() const { return std::max<int64_t>(1, iteration.count); }
  int64_t parts(int64_t phase) const { return phase < steps() ? stripes : chunks(); }
  void run(int64_t phase, int64_t part) { phase == steps() ? write(part) : rows_first ? run_rows(part) : run_tiles(part); }
  void finish(int64_t phase) {
    if (phase < steps()) advance();
    if (phase == steps() - 1) write_vectors();
  }

  void run_rows(int64_t stripe) {
    const auto rows = FASTGAN_FOR_ISA(rows<T>);
    const auto convert = FASTGAN_FOR_ISA(convert<S, T>);
    const int64_t groups = (m.R + 3) / 4, columns = m.columns();
    const int64_t begin = groups * stripe / stripes * 4, end = std::min(m.R, groups * (stripe + 1) / stripes * 4);
    T* z = iteration.count ? column_sums + stripe * round_up(columns) : nullptr;
    if (z) std::fill_n(z, columns, T(0));
    if constexpr (direct)
      if (m.A == 1) return rows(data() + begin * columns, columns, columns, end - begin, q, row_sums + begin, z);
    const auto packed = std::make_unique_for_overwrite<T[]>(4 * columns);
    for (int64_t r = begin; r < end; r += 4) {
      const int64_t count = std::min<int64_t>(4, end - r);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t a = 0; a < m.A; ++a) convert(data() + (a * m.R + r + i) * m.B, m.B, packed.get() + i * columns + a * m.B);
      rows(packed.get(), columns, columns, count, q, row_sums + r, z);
    }
  }

  void run_tiles(int64_t stripe) {
    const auto tile = FASTGAN_FOR_ISA(tile<T>);
    const auto convert = FASTGAN_FOR_ISA(convert<S, T>);
    const auto tile_vectors = FASTGAN_FOR_ISA(tile_vectors<T>);
    const int64_t across = tiles_across(), tiles = m.A * across;
    T* y = row_sums + stripe * round_up(m.R) * lanes;
    std::fill_n(y, m.R * lanes, T(0));
    alignas(64) T z[kWideBytes / sizeof(T)];
    std::unique_ptr<T[]> packed;
    for (int64_t i = tiles * stripe / stripes; i < tiles * (stripe + 1) / stripes; ++i) {
      const int64_t a = i / across, first = i % across * tile_width(), last = std::min(first + tile_width(), m.B);
      for (int64_t b = first, width; b < last; b += width) {
        const S* w = data() + a * m.R * m.B + b;
        T* sums = column_sums + a * m.B + b;
        width = std::min<int64_t>(last - b, kTileBytes / sizeof(T));
        if constexpr (direct)
          if (last - b > width) {
            width = (last - b) / lanes * lanes;
            FASTGAN_FOR_ISA(wide_tile<T>)(w, m.B, m.R, width, p, z, y);
            std::copy_n(z, width, sums);
            continue;
          }
        const int64_t vectors = tile_vectors(width), padded = vectors * lanes;
        bool in_place = false;
        if constexpr (direct)
          if (padded == width) tile(w, m.B, m.R, vectors, p, z, y), in_place = true;
        if (!in_place) {
          if (!packed) packed = std::make_unique<T[]>(m.R * kTileBytes / sizeof(T));
          for (int64_t r = 0; r < m.R; ++r) {
            convert(w + r * m.B, width, packed.get() + r * padded);
            std::fill_n(packed.get() + r * padded + width, padded - width, T(0));
          }
          tile(packed.get(), padded, m.R, vectors, p, z, y);
        }
        std::copy_n(z, width, sums);
      }
    }
  }

  // After all stripes: new p and q, and sigma.
  void advance() {
    const auto squares = FASTGAN_FOR_ISA(squares<T>);
    const int64_t columns = m.columns();
    T *rows = row_sums, *sums = column_sums;  // W q and W^T W q; or, columns first, W W^T p and W^T p
    if (rows_first) {
      if (iteration.count)
        for (int64_t s = 1; s < stripes; ++s) add(sums, sums + s * round_up(columns), columns);
    } else {
      for (int64_t s = 1; s < stripes; ++s) add(rows, rows + s * round_up(m.R) * lanes, m.R * lanes);
      for (int64_t r = 0; r < m.R; ++r) {
        T total = 0;
        for (int64_t i = 0; i < lanes; ++i) total += rows[r * lanes + i];
        rows[r] = total;
      }
    }
    T *first = rows_first ? rows : sums, *second = rows_first ? sums : rows;
    T *first_vector = rows_first ? p : q, *second_vector = rows_first ? q : p;
    const int64_t first_count = rows_first ? m.R : columns, second_count = rows_first ? columns : m.R;
    if (iteration.count) {
      const double first_norm = std::sqrt(squares(first, first_count)), second_norm = std::sqrt(squares(second, second_count));
      const double a = std::max(first_norm, iteration.eps), b = std::max(second_norm / a, iteration.eps);
      if (first_norm > 0 && second_norm > 0 && std::isfinite(first_norm) && std::isfinite(second_norm)) {
        scale_to(first, first_count, 1 / a, first_vector);
        scale_to(second, second_count, 1 / a / b, second_vector);
        sigma = second_norm / a * (second_norm / a) / b;
        return;
      }
    }
    double dot = 0;  // no step: what came first is W q (or W^T p) for the vectors that stay
    for (int64_t i = 0; i < first_count; ++i) dot += double(first[i]) * first_vector[i];
    sigma = dot;
  }

  static void add(T* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
  static void scale_to(const T* from, int64_t count, double factor, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = T(from[i] * factor);
  }

  void write_vectors() {
    *sigma_out = T(sigma);
    store_vector(p, m.R, m.swapped ? m.v_position : none(), static_cast<T*>((m.swapped ? new_v : new_u).mutable_data_ptr()));
    store_vector(q, m.columns(), m.swapped ? none() : m.v_position, static_cast<T*>((m.swapped ? new_u : new_v).mutable_data_ptr()));
  }

  int64_t chunks() const { return (m.numel() + kStripe - 1) / kStripe; }

  void write(int64_t chunk) {
    const int64_t begin = chunk * kStripe, count = std::min(kStripe, m.numel() - begin);
    FASTGAN_FOR_ISA(combine<S, T>)(data() + begin, static_cast<S*>(result.mutable_data_ptr()) + begin, count, T(scale.value(sigma)), T(0),
                                static_cast<const T*>(nullptr), m.past_caches());
    if (m.past_caches()) FASTGAN_FOR_ISA(end_of_stream)();
  }
};

template <class S> struct Backward {
  using T = typename AccumulateIn<S>::Type;

  Matrix m;
  Tensor grad, result;
  const T *u, *v;
  T sigma;
  Scale scale;
  T *p = nullptr, *q = nullptr;
  double *dots = nullptr, inner = 0;

  int64_t rows_per_chunk() const { return std::max<int64_t>(1, kStripe / std::max<int64_t>(1, m.B)); }
  int64_t chunks() const { return m.numel() == 0 ? 0 : (m.A * m.R + rows_per_chunk() - 1) / rows_per_chunk(); }
  int64_t room() const { return round_up(m.R) + round_up(m.columns()) + round_up(chunks()) * int64_t(sizeof(double) / sizeof(T)); }

  void begin(T* memory) {
    dots = reinterpret_cast<double*>(memory);
    p = memory + round_up(chunks()) * int64_t(sizeof(double) / sizeof(T)), q = p + round_up(m.R);
    load_vector(m.swapped ? v : u, m.R, m.swapped ? m.v_position : Forward<S>::none(), p);
    load_vector(m.swapped ? u : v, m.columns(), m.swapped ? Forward<S>::none() : m.v_position, q);
  }

  const S* data(const Tensor& tensor) const { return static_cast<const S*>(tensor.const_data_ptr()); }

  int64_t phases() const { return 2; }
  int64_t parts(int64_t) const { return chunks(); }
  void run(int64_t phase, int64_t part) { phase == 0 ? multiply(part) : write(part); }
  void finish(int64_t phase) {
    if (phase == 0) inner = std::accumulate(dots, dots + chunks(), 0.0);
  }

  void multiply(int64_t chunk) {
    const int64_t begin = chunk * rows_per_chunk() * m.B, end = std::min(m.numel(), begin + rows_per_chunk() * m.B);
    dots[chunk] = FASTGAN_FOR_ISA(dot<S, T>)(data(grad) + begin, data(m.weight) + begin, end - begin);
  }

  void write(int64_t chunk) {
    const auto run = FASTGAN_FOR_ISA(combine<S, T>);
    const T s = T(scale.value(sigma)), k = T(scale.slope(sigma) * inner);
    const int64_t end = std::min(m.A * m.R, (chunk + 1) * rows_per_chunk());
    for (int64_t row = chunk * rows_per_chunk(); row < end; ++row)
      run(data(grad) + row * m.B, static_cast<S*>(result.mutable_data_ptr()) + row * m.B, m.B, s, T(k * p[row % m.R]),
          q + row / m.R * m.B, m.past_caches());
    if (m.past_caches()) FASTGAN_FOR_ISA(end_of_stream)();
  }
};

template <class Layer> void run(std::vector<Layer>& layers) {
  for (size_t first = 0, last; first < layers.size(); first = last) {
    int64_t work = 0, room = 0;
    for (last = first; last < layers.size() && (last == first || work + layers[last].m.numel() <= kTogether); ++last)
      work += layers[last].m.numel(), room += layers[last].room();
    auto* memory = scratch<typename Layer::T>(room);
    for (size_t i = first; i < last; memory += layers[i++].room()) layers[i].begin(memory);
    run_phases(layers, first, last, work);
  }
}

Tensor new_sigma(const Tensor& u, int64_t count, bool single) {
  const int64_t adjacent = 1;
  return new_strided(u, single ? 0 : 1, &count, &adjacent, u.scalar_type());
}

std::tuple<Tensors, Tensors, Tensors> run_forward(const char*, const Tensors& weights, const Tensors& u, const Tensors& v,
                                                  const std::vector<int64_t>& dims, Tensor& sigma, const Iteration& iteration, const Target& target) {
  Tensors results, new_us, new_vs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    results.push_back(iteration.write ? new_like(w) : is_dense(w) ? w : new_tensor_like(w));
    new_us.push_back(new_like(u[i]));
    new_vs.push_back(new_like(v[i]));
  }
  for (ScalarType dtype : kDtypes)
    for_dtype(dtype, [&](auto type) {
      using S = decltype(type);
      using T = typename AccumulateIn<S>::Type;
      std::vector<Forward<S>> layers;
      for (size_t i = 0; i < weights.size(); ++i)
        if (weights[i].scalar_type() == dtype)
          layers.emplace_back(as_matrix(weights[i], results[i], dims[i]), results[i], new_us[i], new_vs[i],
                              static_cast<const T*>(u[i].const_data_ptr()), static_cast<const T*>(v[i].const_data_ptr()),
                              static_cast<T*>(sigma.mutable_data_ptr()) + i, iteration, Scale{target});
      run(layers);
    });
  return {results, new_us, new_vs};
}

Tensors run_backward(const char*, const Tensors& grads, const Tensors& weights, const Tensors& u, const Tensors& v, const Tensor& sigma,
                     const std::vector<int64_t>& dims, const Target& target) {
  Tensors results;
  for (const Tensor& weight : weights) results.push_back(new_like(weight));
  for (ScalarType dtype : kDtypes)
    for_dtype(dtype, [&](auto type) {
      using S = decltype(type);
      using T = typename AccumulateIn<S>::Type;
      std::vector<Backward<S>> layers;
      for (size_t i = 0; i < weights.size(); ++i)
        if (weights[i].scalar_type() == dtype) {
          Matrix matrix = as_matrix(weights[i], results[i], dims[i]);
          layers.push_back({std::move(matrix), laid_out_as(grads[i], results[i]), results[i], static_cast<const T*>(u[i].const_data_ptr()),
                            static_cast<const T*>(v[i].const_data_ptr()), static_cast<const T*>(sigma.const_data_ptr())[i], Scale{target}});
        }
      run(layers);
    });
  return results;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) { fastgan::implement(library); }
