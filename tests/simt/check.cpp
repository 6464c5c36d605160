// Runs every verb over hostile shapes and compares with a plain float64 transcription of the formulas.
//
//     check [quick]      exit status 0: all right; 1: a wrong number, named; 70: tests/simt/simt.h ended it
//
// The device is that of SIMT_ORDER, SIMT_ARCH, SIMT_SHARED_PER_SM and SIMT_LARGEST_CLUSTER; a device with little shared memory makes short rows
// take the way of long ones: clusters on sm_90, reading twice on sm_80.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "row_kernels.h"

using namespace trapo;
using cuda::Dtype;

namespace {

int failures = 0;

// `count` values in a heap block that begins `skip` values after a line of 128 bytes and ends with the last value.
template <class T>
struct Buffer {
  std::unique_ptr<unsigned char, void (*)(void*)> bytes;
  T* data;
  Buffer(size_t skip, size_t count)
      : bytes(line((skip + count) * sizeof(T)), std::free), data(reinterpret_cast<T*>(bytes.get()) + skip) {}
  static unsigned char* line(size_t count) {
    void* out = nullptr;
    if (posix_memalign(&out, 128, count) != 0) std::abort();
    return static_cast<unsigned char*>(out);
  }
};

float load(float x) { return x; }
double load(double x) { return x; }
float load(__half x) { return __half2float(x); }
float load(__nv_bfloat16 x) { return __bfloat162float(x); }
void store(float& to, double x) { to = float(x); }
void store(double& to, double x) { to = x; }
void store(__half& to, double x) { to = __floats2half2_rn(float(x), 0).x; }
void store(__nv_bfloat16& to, double x) { to = __float2bfloat16_rn(float(x)); }

template <class T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr double kTolerance = 1e-5, kRounding = 0;
  using A = float;
};
template <>
struct Kind<double> {
  static constexpr Dtype kDtype = Dtype::kFloat64;
  static constexpr double kTolerance = 1e-11, kRounding = 0;
  using A = double;
};
template <>
struct Kind<__half> {
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static constexpr double kTolerance = 1e-5, kRounding = 1.0 / 2048;
  using A = float;
};
template <>
struct Kind<__nv_bfloat16> {
  static constexpr Dtype kDtype = Dtype::kBfloat16;
  static constexpr double kTolerance = 1e-5, kRounding = 1.0 / 256;
  using A = float;
};

struct Shape {
  int rows, vocab, skip, stride;  // stride and skip in elements
  double cap;
};

// Row statistics and the gradient, in float64, straight from the formulas.
struct Truth {
  std::vector<double> z, slope;
  double max = -INFINITY, rest = 0, dot = 0, target, logprob, log_sum, entropy;

  Truth(const std::vector<double>& x, int y, double cap) : z(x), slope(x.size(), 1) {
    for (size_t j = 0; j < x.size(); ++j) {
      if (cap != 0) z[j] = cap * std::tanh(x[j] / cap), slope[j] = 1 - (z[j] / cap) * (z[j] / cap);
      max = std::max(max, z[j]);
    }
    bool left_out = false;
    for (const double value : z) {
      const double e = std::exp(value - max);
      if (value == max && !left_out)
        left_out = true;
      else
        rest += e;
      if (e > 0) dot += e * (value - max);
    }
    log_sum = std::log1p(rest), target = y < 0 ? NAN : z[size_t(y)];
    logprob = target - max - log_sum, entropy = std::max(0.0, log_sum - dot / (1 + rest));
  }
  double gradient(size_t j, int y, double g_logprob, double g_entropy) const {
    const double p = std::exp(z[j] - max - log_sum), log_p = std::max(z[j] - max - log_sum, -1e4);
    return (g_logprob * (int(j) == y ? -std::expm1(logprob) : -p) - (g_entropy == 0 ? 0 : g_entropy * p * (log_p + entropy))) * slope[j];
  }
};

template <class T>
struct Case {
  using A = typename Kind<T>::A;
  Shape shape;
  Buffer<T> logits;
  std::vector<T> before;
  std::vector<int64_t> targets;
  std::vector<Truth> truth;

  Case(const Shape& s, unsigned seed)
      : shape(s), logits(size_t(s.skip), size_t(s.rows - 1) * size_t(s.stride) + size_t(s.vocab)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, 3);
    for (size_t i = 0; i < size(); ++i) store(logits.data[i], normal(random));
    for (int i = 0; i < s.rows; ++i) {
      targets.push_back(i == 0 ? 0 : i == 1 ? s.vocab - 1 : int(random() % unsigned(s.vocab)));
      if (i == 2 && s.vocab > 1) store(row(i)[(targets[2] + 1) % s.vocab], -INFINITY);
      if (leads(i)) store(row(i)[targets[0]], 40);
      if (i == 1 && s.rows > 3) store(row(i)[0], 40), store(row(i)[targets[1]], 40);  // a tie
      std::vector<double> x;
      for (int j = 0; j < s.vocab; ++j) x.push_back(load(row(i)[j]));
      truth.emplace_back(x, int(targets.back()), s.cap);
    }
    before.assign(logits.data, logits.data + size());
  }
  // Its target is likelier than all else by more than fp32 can tell from 1.
  bool leads(int i) const { return i == 0 && shape.rows > 2; }
  size_t size() const { return size_t(shape.rows - 1) * size_t(shape.stride) + size_t(shape.vocab); }
  T* row(int i) const { return logits.data + size_t(i) * size_t(shape.stride); }
  cuda::Logits call() {
    return {logits.data, Kind<T>::kDtype, shape.rows, shape.vocab, shape.stride, targets.data(), shape.cap, nullptr};
  }
  void fail(const char* verb, const char* what, int i, double got, double expected) const {
    if (++failures > 5) return;
    std::printf("%s: %s of row %d is %.9g instead of %.9g (dtype %d, [%d, %d], skip %d, stride %d, cap %g)\n", verb, what, i,
                got, expected, int(Kind<T>::kDtype), shape.rows, shape.vocab, shape.skip, shape.stride, shape.cap);
  }
  void same(const char* verb, const char* what, int i, double got, double expected) const {
    if (std::isnan(got) && std::isnan(expected)) return;
    if (!(std::abs(got - expected) <= Kind<T>::kTolerance * std::max(1.0, std::abs(expected))))
      fail(verb, what, i, got, expected);
  }
  void same_relative(const char* verb, const char* what, int i, double got, double expected) const {
    if (!(std::abs(got - expected) <= 2 * Kind<T>::kTolerance * std::abs(expected))) fail(verb, what, i, got, expected);
  }
  void same_gradient(const char* verb, int i, double g_logprob, double g_entropy) const {
    std::vector<double> expected;
    double largest = 1e-3;
    for (int j = 0; j < shape.vocab; ++j) {
      expected.push_back(truth[size_t(i)].gradient(size_t(j), int(targets[size_t(i)]), g_logprob, g_entropy));
      largest = std::max(largest, std::abs(expected.back()));
    }
    for (int j = 0; j < shape.vocab; ++j) {
      const double got = load(row(i)[j]), right = expected[size_t(j)];
      // Half a unit in the last place of the result (6e-8 where it is denormal in fp16), and what fp32 does before it.
      const bool relative = leads(i) && shape.cap == 0;
      const double allowed = 2 * Kind<T>::kTolerance * (relative ? std::abs(right) : largest) + Kind<T>::kRounding * std::abs(right) +
                             (Kind<T>::kDtype == Dtype::kFloat16 ? 6e-8 : 0);
      if (!(std::abs(got - right) <= allowed)) return fail(verb, "a gradient", i, got, right);
    }
  }
  // What lies between the rows is none of the kernels' business.
  void same_gaps(const char* verb) const {
    for (int i = 0; i + 1 < shape.rows; ++i)
      for (int j = shape.vocab; j < shape.stride; ++j)
        if (std::memcmp(row(i) + j, &before[size_t(i) * size_t(shape.stride) + size_t(j)], sizeof(T)) != 0)
          return fail(verb, "the gap after the end", i, load(row(i)[j]), load(before[size_t(i * shape.stride + j)]));
  }
};

template <class T>
struct Vectors {
  std::vector<std::vector<T>> values;
  Vectors(int count, int rows) : values(size_t(count), std::vector<T>(size_t(rows), T(-77))) {}
  T* operator[](int i) { return values[size_t(i)].data(); }
};

template <class T>
void check_stats(const Shape& shape) {
  Case<T> c(shape, 1);
  Vectors<typename Kind<T>::A> out(4, shape.rows);
  cuda::stats(c.call(), {out[0], out[1], out[2], out[3]});
  for (int i = 0; i < shape.rows; ++i) {
    const Truth& t = c.truth[size_t(i)];
    c.same("stats", "max", i, out[0][i], t.max), c.same("stats", "rest", i, out[1][i], t.rest);
    c.same("stats", "dot", i, out[2][i], t.dot), c.same("stats", "target", i, out[3][i], t.target);
  }
  if (std::memcmp(c.logits.data, c.before.data(), c.size() * sizeof(T)) != 0) c.fail("stats", "the input", 0, 0, 0);
}

template <class T>
void check_grad(const Shape& shape, bool entropy) {
  using A = typename Kind<T>::A;
  Case<T> c(shape, 2);
  Vectors<A> in(6, shape.rows);
  for (int i = 0; i < shape.rows; ++i) {
    const Truth& t = c.truth[size_t(i)];
    in[0][i] = A(t.logprob), in[1][i] = A(t.max), in[2][i] = A(t.log_sum), in[3][i] = A(t.entropy);
    in[4][i] = i % 4 == 3 ? A(0) : A(0.75 - i), in[5][i] = i % 4 == 3 ? A(0) : A(0.25 + i);  // the fourth has no gradient
  }
  cuda::grad(c.call(), {in[0], in[1], in[2], entropy ? in[3] : nullptr, in[4], entropy ? in[5] : nullptr});
  for (int i = 0; i < shape.rows; ++i) c.same_gradient("grad_", i, in[4][i], entropy ? in[5][i] : 0);
  c.same_gaps("grad_");
}

template <class T>
void check_fused(const Shape& shape, bool with_entropy) {
  using A = typename Kind<T>::A;
  Case<T> c(shape, 3);
  const Terms<double> terms{kTrsft, kClip, 0.7, 0.1, 0.1, 0.8, 1.28, 3.0, with_entropy ? 0.05 : 0.0,
                            with_entropy ? 0.1 : 0.0, 2.0};
  Vectors<A> in(6, shape.rows), out(4, shape.rows);
  // A 16-bit head knows z_y better than from what was rounded.
  const bool exact = sizeof(T) == 2 && shape.cap == 0;
  for (int i = 0; i < shape.rows && exact; ++i) {
    const auto y = size_t(c.targets[size_t(i)]);
    std::vector<double> x = c.truth[size_t(i)].z;
    x[y] += 0.3 * Kind<T>::kRounding * std::abs(x[y]);
    c.truth[size_t(i)] = Truth(x, int(y), 0), in[5][i] = A(x[y]);
  }
  std::unique_ptr<bool[]> expert(new bool[size_t(shape.rows)]);
  if (shape.rows > 4) c.targets[4] = -100, c.truth[4].logprob = NAN;  // refused by NaN
  for (int i = 0; i < shape.rows; ++i) {
    expert[size_t(i)] = i % 3 == 1;
    in[0][i] = i % 4 == 3 ? A(0) : A(1.5 - i);  // the fourth has no gradient, unless by entropy or KL
    in[1][i] = A(c.truth[size_t(i)].logprob + 0.1), in[2][i] = A(c.truth[size_t(i)].logprob - 0.2);
    in[3][i] = A(c.truth[size_t(i)].logprob + 0.05);
    in[4][i] = i == 2 ? A(0) : A(0.25 * (i + 1));
    if (i == 2) in[1][i] = A(NAN);  // of a row that does not count
  }
  cuda::fused(c.call(), {expert.get(), in[0], in[1], in[2], in[3], in[4], exact ? in[5] : nullptr, terms, 0.5},
              {out[0], out[1], out[2], out[3]});
  for (int i = 0; i < shape.rows; ++i) {
    const Truth& t = c.truth[size_t(i)];
    if (exact && i == 4) {  // of a target that there is not, nothing is known
      if (!std::isnan(out[0][i])) c.fail("fused_", "logprob", i, out[0][i], NAN);
      continue;
    }
    c.same("fused_", "logprob", i, out[0][i], t.logprob), c.same("fused_", "max", i, out[1][i], t.max);
    if (c.leads(i)) c.same_relative("fused_", "logprob", i, out[0][i], t.logprob);
    c.same("fused_", "log_sum", i, out[2][i], t.log_sum), c.same("fused_", "entropy", i, out[3][i], t.entropy);
    if (i == 4) continue;
    const Token<double> token{expert[size_t(i)], true, in[0][i], in[1][i], in[2][i], in[3][i], in[4][i]};
    const auto g = slopes(terms, token, RowStats<double>{t.logprob, t.max, t.log_sum, t.entropy});
    c.same_gradient("fused_", i, 0.5 * g.logprob, 0.5 * g.entropy);
  }
  c.same_gaps("fused_");
}

// Rows of the weight are `width` values, `stride` apart; all begin `skip` values after a line.
template <class T>
void check_targets(int rows, int vocab, int width, int skip, int stride, bool with_bias) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal(0, 1);
  const auto filled = [&](int count) {
    Buffer<T> out(size_t(skip), size_t(count - 1) * size_t(stride) + size_t(width));
    for (size_t i = 0; i < size_t(count - 1) * size_t(stride) + size_t(width); ++i) store(out.data[i], normal(random));
    return out;
  };
  const Buffer<T> hidden = filled(rows), weight = filled(vocab), bias = filled(vocab);
  std::vector<int64_t> targets;
  for (int i = 0; i < rows; ++i) targets.push_back(i == 1 ? vocab : i == 2 ? -100 : int(random() % unsigned(vocab)));
  std::vector<float> out(size_t(rows), -77);
  cuda::target_logits({hidden.data, weight.data, with_bias ? bias.data : nullptr, Kind<T>::kDtype, rows, vocab, stride, stride,
                       width, targets.data(), 1.5, nullptr}, out.data());
  for (int i = 0; i < rows; ++i) {
    const auto y = size_t(targets[size_t(i)]);
    const bool known = y < size_t(vocab);
    double right = known ? 0 : NAN, size = 1;
    for (int k = 0; k < width && known; ++k) {
      const double a = load(hidden.data[size_t(i * stride + k)]), b = load(weight.data[y * size_t(stride) + size_t(k)]);
      right += a * b, size += std::abs(a * b);
    }
    if (with_bias && known) right += load(bias.data[y]);
    const double got = out[size_t(i)];
    if (std::isnan(right) ? std::isnan(got) : std::abs(got - 1.5 * right) <= 1e-6 * size) continue;
    if (++failures <= 5) std::printf("target_logits: row %d is %.9g instead of %.9g (D %d)\n", i, got, 1.5 * right, width);
  }
}

template <class T>
void check_all(const std::vector<Shape>& shapes) {
  for (const Shape& shape : shapes) {
    check_stats<T>(shape);
    check_grad<T>(shape, shape.vocab % 2 == 0), check_fused<T>(shape, shape.vocab % 2 == 0);
  }
}

}  // namespace

int main(int argc, char**) {
  std::vector<Shape> shapes{
      {3, 1, 0, 1, 0},      {4, 2, 3, 5, 0},      {6, 7, 1, 7, 0},        {3, 9, 5, 33, 2.0},   {4, 64, 0, 64, 0},
      {6, 257, 0, 257, 0},  {2, 500, 7, 512, 2.0}, {5, 1031, 8, 1040, 0}, {2, 2048, 0, 2048, 0}, {3, 4099, 1, 4099, 0},
  };
  if (argc > 1) shapes = {{2, 7, 1, 7, 0}, {4, 258, 0, 258, 2.0}, {3, 1031, 5, 1031, 0}};
  check_all<__nv_bfloat16>(shapes);
  check_all<float>(shapes);
  for (const bool bias : {false, true}) {
    check_targets<__nv_bfloat16>(4, 5, 1, 0, 1, bias), check_targets<__nv_bfloat16>(3, 40, 264, 0, 264, bias);
    check_targets<__half>(5, 9, 519, 3, 521, bias), check_targets<__half>(3, 9, 600, 8, 608, bias);
  }
#ifndef SIMT_FEW_DTYPES
  check_all<__half>(shapes);
  check_all<double>(shapes);
#endif
  std::printf("%d failures\n", failures);
  return failures > 0;
}
