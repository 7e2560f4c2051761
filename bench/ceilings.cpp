// What the memory gives: one pass over R arrays read and W arrays written, with next to no arithmetic.
// Built when the benches start, for the machine they run on; see ceilings.py. It includes nothing of torch,
// whose headers would take half a minute, and shares torch's OpenMP threads: the loader finds its libgomp.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kStep = 32;              // floats in one turn of the loop: two cache lines
constexpr int64_t kGrain = 32 * 1024 / 4;  // floats below which a second thread costs more than it brings

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
Pass choose(int reads, int writes) {
  switch (reads * 10 + writes) {
    case 10: return pass<T, 1, 0>;
    case 11: return pass<T, 1, 1>;
    case 12: return pass<T, 1, 2>;
    case 20: return pass<T, 2, 0>;
    case 21: return pass<T, 2, 1>;
    case 32: return pass<T, 3, 2>;
  }
  return nullptr;
}

}  // namespace

// Arrays of n floats, those written at addresses divisible by 32. False for a mix it lacks. `sum` becomes something of all
// that was read, whatever that is: compilers leave out what nobody sees.
extern "C" bool mix(
    const float* const* in, int reads, float* const* out, int writes, int64_t n, int threads, int streaming, double* sum) {
  const Pass run = streaming ? choose<Streaming>(reads, writes) : choose<Wide>(reads, writes);
  if (!run) return false;
  const int64_t steps = n / kStep, parts = std::clamp<int64_t>(n / kGrain, 1, threads);
  double total = 0;
#pragma omp parallel for num_threads(parts) schedule(static) reduction(+ : total) if (parts > 1)
  for (int64_t p = 0; p < parts; ++p)
    total += run(in, out, p * steps / parts * kStep, (p + 1) * steps / parts * kStep);
  *sum = total;
  return true;
}
