// Drivers of the elementwise kernels: packs of up to 16 bytes, alpha by (outer, mid, inner), fixed partial sums.
//
// An op is a struct of pointers with a member
//   template <int N> __device__ void apply(int64_t first, int count, const acc_t (&alpha)[N])
// that handles `count` (N, but for the last pack) elements from `first` on.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cuda/launch.cuh"

namespace tolaria::cuda {

// N values of one thread; aligned as a whole, so that it moves in one access (of 16 bytes where N fills them).
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// The machine word of so many bytes. Loads and stores of words are intrinsics: plain ones are split by the compiler where
// it can share a first element with the path for partial packs.
template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<1> {
  using type = unsigned char;
};

// A pack as words of at most 16 bytes.
template <typename T, int N>
struct Words {
  static constexpr int bytes = sizeof(T) * N < 16 ? sizeof(T) * N : 16;
  static constexpr int count = sizeof(T) * N / bytes;
  using type = typename Word<bytes>::type;
};

template <int N, typename T>
__device__ inline Pack<T, N> load_whole(const T* data) {
  using words = Words<T, N>;
  typename words::type word[words::count];
#pragma unroll
  for (int w = 0; w < words::count; ++w) word[w] = __ldg(reinterpret_cast<const typename words::type*>(data) + w);
  Pack<T, N> pack;
  memcpy(static_cast<void*>(&pack), word, sizeof(word));
  return pack;
}

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* data, int64_t first, int count) {
  if (count == N) return load_whole<N>(data + first);
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.value[j] = j < count ? data[first + j] : T(0.0f);
  return pack;
}

template <int N, typename T>
__device__ inline void store(T* data, int64_t first, int count, const Pack<T, N>& pack) {
  if (count == N) {
    using words = Words<T, N>;
    typename words::type word[words::count];
    memcpy(word, static_cast<const void*>(&pack), sizeof(word));
#pragma unroll
    for (int w = 0; w < words::count; ++w) __stwb(reinterpret_cast<typename words::type*>(data + first) + w, word[w]);
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < count) data[first + j] = pack.value[j];
  }
}

// Whether packs of N elements may be read from here.
inline bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// How a pack finds its alphas: one for all; as many consecutive ones; or by walking over the rows it touches.
enum class AlphaAccess { kScalar, kVector, kWalk };

template <typename acc_t>
struct AlphaView {
  const acc_t* values;
  int64_t mid, inner;

  explicit AlphaView(const AlphaLayout& layout)
      : values(layout.values.const_data_ptr<acc_t>()), mid(layout.mid), inner(layout.inner) {}

  // a / b for a >= 0, b > 0: divisions of 64 bits are slow, and most tensors need none.
  static __device__ int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }

  __device__ int64_t row_of(int64_t element) const { return quotient(element, inner); }
  __device__ int64_t index_of(int64_t row) const { return row - quotient(row, mid) * mid; }

  template <int N, AlphaAccess access>
  __device__ void read(int64_t first, int count, acc_t (&alpha)[N]) const {
    if constexpr (access == AlphaAccess::kScalar) {
      const acc_t value = values[0];
#pragma unroll
      for (int j = 0; j < N; ++j) alpha[j] = value;
    } else if constexpr (access == AlphaAccess::kVector) {  // inner == 1
      const Pack<acc_t, N> pack = load<N>(values, index_of(first), count);
#pragma unroll
      for (int j = 0; j < N; ++j) alpha[j] = pack.value[j];
    } else {
      const int64_t row = row_of(first);
      int64_t place = first - row * inner, index = index_of(row);
      acc_t value = values[index];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (place == inner && j < count) {
          place = 0;
          if (++index == mid) index = 0;
          value = values[index];
        }
        alpha[j] = value;
        ++place;
      }
    }
  }
};

template <typename acc_t, int N, AlphaAccess access, class Op>
__global__ void __launch_bounds__(kBlock) map_kernel(Op op, AlphaView<acc_t> view, int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock * N;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * N; first < n; first += stride) {
    const int count = n - first < N ? static_cast<int>(n - first) : N;
    acc_t alpha[N];
    view.template read<N, access>(first, count, alpha);
    op.template apply<N>(first, count, alpha);
  }
}

// Below so many alphas in a row, packs that walk over them find all in a sector; above, lone elements side by side do.
constexpr int64_t kWalkedAlphas = 8;

// Runs the op over all elements. N: elements of the widest access; `aligned`: whether every array allows it.
template <int N, typename acc_t, class Op>
void for_each_pack(const AlphaLayout& layout, bool aligned, const Op& op) {
  const AlphaView<acc_t> view(layout);
  const int64_t n = layout.outer * layout.mid * layout.inner;
  constexpr int M = std::min<int>(N, 16 / sizeof(acc_t));  // alphas are the widest array where each element has its own
  const bool has_own_alphas = layout.inner == 1 && (layout.mid % M == 0 || layout.outer == 1);
  if (aligned && layout.mid == 1) {
    TOLARIA_LAUNCH((map_kernel<acc_t, N, AlphaAccess::kScalar, Op>), grid_for(n, N), kBlock, op, view, n);
  } else if (aligned && has_own_alphas && is_aligned(view.values, M * sizeof(acc_t))) {
    TOLARIA_LAUNCH((map_kernel<acc_t, M, AlphaAccess::kVector, Op>), grid_for(n, M), kBlock, op, view, n);
  } else if (aligned && (layout.inner > 1 || layout.mid <= kWalkedAlphas)) {
    TOLARIA_LAUNCH((map_kernel<acc_t, N, AlphaAccess::kWalk, Op>), grid_for(n, N), kBlock, op, view, n);
  } else {
    TOLARIA_LAUNCH((map_kernel<acc_t, 1, AlphaAccess::kWalk, Op>), grid_for(n, 1), kBlock, op, view, n);
  }
}

}  // namespace tolaria::cuda
