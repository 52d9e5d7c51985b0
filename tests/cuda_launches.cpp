// Stands in for csrc/cuda's kernels, and for torch's devices and streams: launches that do on CPU memory, as plainly as can be, what
// the headers say of them. With these, csrc/cuda/<op>.cpp runs, and can be compared, where there is no GPU.
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda/gradient_penalty.h"
#include "cuda/minibatch_discrimination.h"
#include "cuda/minibatch_stddev.h"
#include "cuda/spectral_norm.h"
#include "cuda/tangent_combine.h"

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

namespace fastgan {

std::atomic<int64_t> calls{0};

Stream current_stream(int32_t) { return reinterpret_cast<Stream>(16); }

namespace {

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

template <class F> void for_dtype(Dtype dtype, Stream stream, const F& f) {
  expect(reinterpret_cast<uintptr_t>(stream) == 16, "the stream is another");
  expect(dtype == Dtype::float32 || dtype == Dtype::float64, "the dtype is another");
  dtype == Dtype::float32 ? f(float()) : f(double());
}

}  // namespace

namespace gradient_penalty {

void launch_norms(Dtype dtype, Strip grads, int64_t rows, int64_t length, const Form& form, double* sums, void* penalty, void* norms, void* factors,
                  Stream stream) {
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    std::memset(sums, 0xff, rows * pieces_of_row(length) * sizeof(double));  // there is room for them
    double total = 0, largest = 0, reached = 0;
    const auto square = [&](int64_t row) {
      double q = 0;
      for (int64_t i = 0; i < length; ++i) q += std::pow(double(grads.in<T>()[row * grads.stride + i]), 2);
      return q;
    };
    for (int64_t row = 0; row < rows; ++row) largest = std::max(largest, square(row));
    for (int64_t row = 0; row < rows; ++row) reached += square(row) == largest;
    for (int64_t row = 0; row < rows; ++row) {
      const double q = square(row), n = std::sqrt(q), excess = form.one_sided && n < form.target ? 0 : n - form.target;
      double value = excess * excess / form.count, slope = 2 * excess / n / form.count;
      if (form.kind == Kind::zero_centered) value = q / 2 / form.count, slope = 1 / form.count;
      if (form.kind == Kind::power) value = std::pow(n, form.power) / form.count, slope = form.power * std::pow(n, form.power - 2) / form.count;
      if (form.kind == Kind::max) value = q == largest ? q / reached : 0, slope = q == largest ? 2 / reached : 0;
      total += form.weight * value;
      static_cast<T*>(norms)[row] = T(n), static_cast<T*>(factors)[row] = T(n == 0 ? 0 : form.weight * slope);
    }
    *static_cast<T*>(penalty) = T(total);
  });
}

void launch_scale(const char*, Dtype dtype, Strip grads, Strip factors, Strip out, int64_t rows, int64_t length, Stream stream) {
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < length; ++i)
        out.out<T>()[row * out.stride + i] = grads.in<T>()[row * grads.stride + i] * factors.in<T>()[row * factors.stride];
  });
}

}  // namespace gradient_penalty

namespace minibatch_discrimination {

void launch(const char*, const Pairs& pairs, const Cut& cut, void* scratch, Stream stream) {
  for_dtype(pairs.dtype, stream, [&](auto type) {
    using T = decltype(type);
    std::memset(scratch, 0xff, cut.scratch);  // there is room for it
    const auto read = [&](const void* from, int64_t at) { return from ? double(static_cast<const T*>(from)[at]) : 0; };
    for (int64_t i = 0; i < pairs.B; ++i)
      for (int64_t k = 0; k < pairs.K; ++k) {
        const int64_t row = i * pairs.K + k;
        double value = 0;
        std::vector<double> gradient(pairs.D);
        for (int64_t j = 0; j < pairs.B; ++j) {
          const int64_t other = j * pairs.K + k;
          double distance = 0, slope = 0;
          std::vector<double> signs(pairs.D);
          for (int64_t d = 0; d < pairs.D; ++d) {
            const double difference = read(pairs.m, row * pairs.D + d) - read(pairs.m, other * pairs.D + d);
            signs[d] = (difference > 0) - (difference < 0), distance += std::abs(difference);
            slope += signs[d] * (read(pairs.tangent, row * pairs.D + d) - read(pairs.tangent, other * pairs.D + d));
          }
          const double counted = -std::exp(-distance) * (pairs.tangent ? slope : 1);
          if (pairs.tangent || pairs.self_term || i != j) value += pairs.tangent ? counted : -counted;
          const double weight = (read(pairs.grad, row) + read(pairs.grad, other)) * counted;
          for (int64_t d = 0; d < pairs.D; ++d) gradient[d] += (pairs.tangent ? -weight : weight) * signs[d];
        }
        if (pairs.values) static_cast<T*>(pairs.values)[row] = T(value);
        for (int64_t d = 0; pairs.gradient && d < pairs.D; ++d) static_cast<T*>(pairs.gradient)[row * pairs.D + d] = T(gradient[d]);
      }
  });
}

}  // namespace minibatch_discrimination

namespace minibatch_stddev {

void launch(const char*, Dtype dtype, const Problem& p, const Tensors& tensors, const Cut& cut, double* scratch, Stream stream) {
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    if (scratch) std::memset(scratch, 0xff, cut.scratch(p, tensors) * sizeof(double));  // there is room for it
    const auto at = [](const Samples& of, int64_t sample, int64_t offset) -> T& {
      return const_cast<T*>(static_cast<const T*>(of.data))[sample * of.sample + offset];
    };
    const auto& [x, v, grad, values, gradient] = tensors;
    for (int64_t group = 0; group < p.groups; ++group)
      for (int64_t slice = 0; slice < p.slices; ++slice) {
        const int64_t size = p.size + (group < p.larger), count = size - p.unbiased;
        const auto sample = [&](int64_t i) { return p.strided ? group + i * p.groups : group * p.size + std::min(group, p.larger) + i; };
        const auto position = [&](const Samples& of, int64_t q) { return slice * p.run + q / p.run * of.place + q % p.run; };
        const auto appended = [&](const Samples& of, int64_t place) { return p.slices * p.run + slice * p.channel + place * of.place; };
        double reached = 0, total = 0;
        for (int64_t i = 0; i < size; ++i)
          for (int64_t place = 0; grad.data && place < p.places; ++place) reached += at(grad, sample(i), appended(grad, place));
        for (int64_t q = 0; q < p.positions; ++q) {
          double mean = 0, mean_v = 0, squares = 0, products = 0;
          const auto read = [&](const Samples& of, int64_t i) { return of.data ? double(at(of, sample(i), position(of, q))) : 0; };
          for (int64_t i = 0; i < size; ++i) mean += read(x, i) / size, mean_v += read(v, i) / size;
          for (int64_t i = 0; i < size; ++i) {
            const double d = read(x, i) - mean;
            squares += d * d, products += d * (read(v, i) - mean_v);
            if (values.data) at(values, sample(i), position(values, q)) = T(read(v.data ? v : x, i));
          }
          const double sigma = std::sqrt(squares / count + p.eps), inverse = sigma == 0 ? 0 : 1 / sigma, q_sigma = products / count * inverse;
          total += v.data ? q_sigma : sigma;
          for (int64_t i = 0; gradient.data && i < size; ++i) {
            const double d = read(x, i) - mean, weight = reached / p.positions / count * inverse;
            at(gradient, sample(i), position(gradient, q)) =
                T(v.data ? weight * (read(v, i) - mean_v - q_sigma * inverse * d) : read(grad, i) + weight * d);
          }
        }
        for (int64_t i = 0; i < size; ++i)
          for (int64_t place = 0; values.data && place < p.places; ++place)
            at(values, sample(i), appended(values, place)) = T(total / p.positions);
      }
  });
}

}  // namespace minibatch_stddev

namespace tangent_combine {

void launch(Dtype dtype, Strip t, Strip a, Strip factors, Strip passed, Strip combined, int64_t rows, int64_t length, double slope, Stream stream) {
  expect(passed.stride == combined.stride, "the results' strides differ");
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < length; ++i) {
        const T tangent = t.in<T>()[row * t.stride + i], activation = a.in<T>()[row * a.stride + i];
        const T through = activation > 0 ? tangent : tangent * T(slope);
        passed.out<T>()[row * passed.stride + i] = through;
        combined.out<T>()[row * combined.stride + i] = factors.in<T>()[row * factors.stride] * activation + through;
      }
  });
}

}  // namespace tangent_combine

namespace spectral_norm {

namespace {

struct Scale {
  double value, slope;
  Scale(double sigma, const Target& target) {
    const bool active = target.at_most ? !(sigma <= target.value) : sigma != 0;
    value = active ? target.value / sigma : 1, slope = active ? -value / sigma : 0;
  }
};

// W v, or W^T u.
template <class T> std::vector<double> product(const Layer& layer, bool transposed, const std::vector<double>& x) {
  std::vector<double> result(transposed ? layer.columns : layer.rows);
  for (int row = 0; row < layer.rows; ++row)
    for (int column = 0; column < layer.columns; ++column) {
      const double w = static_cast<const T*>(layer.weight)[layer.place(row, column)];
      transposed ? result[column] += w * x[row] : result[row] += w * x[column];
    }
  return result;
}

double norm(const std::vector<double>& x) {
  double square = 0;
  for (double each : x) square += each * each;
  return std::sqrt(square);
}

}  // namespace

int64_t shared_limit(int) { return 99 << 10; }

void launch_forward(const char*, Dtype dtype, const std::vector<Layer>& layers, const Iteration& iteration, const Target& target, Stream stream) {
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    for (const Layer& layer : layers) {
      expect(layer.own > 0 && layer.chunk > 0 && layer.tiles > 0, "tiles have not been chosen");
      expect(layer.numel() == 0 || iteration.write == (layer.out != nullptr), "there is a result that nobody wants, or none");
      std::memset(layer.scratch, 0xff, Scratch<T>::bytes(layer, iteration.v_first));  // there is room for it
      std::vector<double> u(layer.rows), v(layer.columns);
      for (int row = 0; row < layer.rows; ++row) u[row] = static_cast<const T*>(layer.u)[row];
      for (int column = 0; column < layer.columns; ++column) v[column] = static_cast<const T*>(layer.v)[layer.place_in_v(column)];
      for (int64_t step = 0; step < iteration.count; ++step) {
        std::vector<double> new_u = u, new_v = v;
        for (bool of_v : {iteration.v_first, !iteration.v_first}) {
          std::vector<double>& x = of_v ? new_v : new_u;
          x = product<T>(layer, of_v, of_v ? new_u : new_v);
          const double length = std::max(norm(x), iteration.eps);
          for (double& each : x) each /= length;
        }
        if (norm(new_u) > 0 && norm(new_v) > 0) u = new_u, v = new_v;
      }
      const std::vector<double> y = product<T>(layer, false, v);
      double sigma = 0;
      for (int row = 0; row < layer.rows; ++row) sigma += u[row] * y[row], static_cast<T*>(layer.new_u)[row] = T(u[row]);
      for (int column = 0; column < layer.columns; ++column) static_cast<T*>(layer.new_v)[layer.place_in_v(column)] = T(v[column]);
      *static_cast<T*>(layer.sigma) = T(sigma);
      for (int64_t i = 0; iteration.write && i < layer.numel(); ++i)
        static_cast<T*>(layer.out)[i] = T(static_cast<const T*>(layer.weight)[i] * Scale(sigma, target).value);
    }
  });
}

void launch_backward(const char*, Dtype dtype, const std::vector<Layer>& layers, const Target& target, Stream stream) {
  for_dtype(dtype, stream, [&](auto type) {
    using T = decltype(type);
    for (const Layer& layer : layers) {
      std::memset(layer.scratch, 0xff, layer.inner_blocks() * sizeof(double));
      const T *grad = static_cast<const T*>(layer.grad), *u = static_cast<const T*>(layer.u), *v = static_cast<const T*>(layer.v);
      const Scale scale(*static_cast<const T*>(layer.sigma), target);
      double inner = 0;
      for (int64_t i = 0; i < layer.numel(); ++i) inner += double(grad[i]) * double(static_cast<const T*>(layer.weight)[i]);
      for (int row = 0; row < layer.rows; ++row)
        for (int column = 0; column < layer.columns; ++column) {
          const int64_t at = layer.place(row, column);
          static_cast<T*>(layer.out)[at] = T(scale.value * grad[at] + scale.slope * inner * u[row] * v[layer.place_in_v(column)]);
        }
    }
  });
}

}  // namespace spectral_norm

}  // namespace fastgan
