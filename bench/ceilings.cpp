// What the memory gives: one pass over R arrays read and W arrays written, with next to no arithmetic.
// Built when the benches start, for the machine they run on; see ceilings.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kStep = 32;          // floats in one turn of the loop: two cache lines
constexpr int64_t kGrain = 32 * 1024;  // bytes below which a second thread costs more than it brings

struct Plain {
  using V = float;
  static constexpr int64_t width = 1;
  static V load(const float* p) { return *p; }
  static V add(V a, V b) { return a + b; }
  static V zero() { return 0.f; }
  static void store(float* p, V v) { *p = v; }
  static float first(V v) { return v; }
};

#ifdef __AVX__
struct Wide {
  using V = __m256;
  static constexpr int64_t width = 8;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V zero() { return _mm256_setzero_ps(); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static float first(V v) { return _mm256_cvtss_f32(v); }
};
struct Streaming : Wide {  // past the caches: no line is read before it is overwritten
  static void store(float* p, V v) { _mm256_stream_ps(p, v); }
};
#else
using Wide = Plain;
using Streaming = Plain;
#endif

template <class T, int R, int W>
float pass(const float* const* in, float* const* out, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kStep / T::width;
  typename T::V total[lanes];
  for (auto& lane : total) lane = T::zero();
  for (int64_t i = begin; i < end; i += kStep)
    for (int64_t k = 0; k < lanes; ++k) {
      auto sum = T::load(in[0] + i + k * T::width);
      for (int r = 1; r < R; ++r) sum = T::add(sum, T::load(in[r] + i + k * T::width));
      if constexpr (W == 0) total[k] = T::add(total[k], sum);
      for (int w = 0; w < W; ++w) T::store(out[w] + i + k * T::width, sum);
    }
#ifdef __AVX__
  _mm_sfence();
#endif
  auto sum = total[0];
  for (int64_t k = 1; k < lanes; ++k) sum = T::add(sum, total[k]);
  return T::first(sum);
}

using Pass = float (*)(const float* const*, float* const*, int64_t, int64_t);

template <class T>
Pass choose(size_t reads, size_t writes) {
  switch (reads * 10 + writes) {
    case 10: return pass<T, 1, 0>;
    case 11: return pass<T, 1, 1>;
    case 12: return pass<T, 1, 2>;
    case 20: return pass<T, 2, 0>;
    case 21: return pass<T, 2, 1>;
    case 32: return pass<T, 3, 2>;
  }
  TORCH_CHECK_VALUE(false, "mix: expected 1 to 3 reads and 0 to 2 writes, got ", reads, " and ", writes);
}

// All tensors: float32, dense, of one size, at addresses divisible by 32. Returns something of all it read.
double mix(at::TensorList reads, at::TensorList writes, bool streaming) {
  const int64_t n = reads[0].numel() / kStep * kStep;
  std::vector<const float*> in;
  std::vector<float*> out;
  for (const auto& t : reads) in.push_back(t.const_data_ptr<float>());
  for (const auto& t : writes) out.push_back(t.mutable_data_ptr<float>());
  const Pass run = streaming ? choose<Streaming>(in.size(), out.size()) : choose<Wide>(in.size(), out.size());
  std::atomic<float> sink{0.f};
  at::parallel_for(0, n / kStep, kGrain / (4 * kStep), [&](int64_t begin, int64_t end) {
    sink.store(run(in.data(), out.data(), begin * kStep, end * kStep), std::memory_order_relaxed);
  });
  return sink.load();
}

}  // namespace

TORCH_LIBRARY(tolaria_bench, m) { m.def("mix(Tensor[] reads, Tensor[] writes, bool streaming) -> float"); }
TORCH_LIBRARY_IMPL(tolaria_bench, CPU, m) { m.impl("mix", mix); }
