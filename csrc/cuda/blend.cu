// blend and seed_gate on CUDA: one pass forward, one pass backward, each array read and written once.
#include "math/blend.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/blend_plan.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "cuda/elementwise.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace tolaria {
namespace {

using cuda::AlphaView;
using cuda::kBlock;
using cuda::kWarp;
using cuda::load;
using cuda::Pack;
using cuda::store;

// Elements of one row that a warp sums: the unit of a partial sum of grad_alpha.
constexpr int64_t kPiece = 4096;
// Most threads that keep column sums, and fewest rows for each: partial sums stay a small part of what is moved.
constexpr int64_t kColumnThreads = 65536, kColumnRows = 16;

// Elements that fill a 16-byte access of the widest dtype.
template <typename... T>
constexpr int kPackSize = 16 / static_cast<int>(std::max({sizeof(T)...}));

template <typename host_t, typename seed_t, typename acc_t>
struct BlendForward {
  const host_t* host;
  const seed_t* seed;
  host_t* out;

  template <int N>
  __device__ void apply(int64_t first, int count, const acc_t (&alpha)[N]) const {
    const Pack<host_t, N> h = load<N>(host, first, count);
    const Pack<seed_t, N> s = load<N>(seed, first, count);
    Pack<host_t, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.value[j] = math::blend(h.value[j], s.value[j], alpha[j]);
    store(out, first, count, result);
  }
};

// Null pointers are gradients that nobody asked for. `alpha_direct` is for alphas of one element each; sums over more
// are made by the kernels below, with `gradients`.
template <typename host_t, typename seed_t, typename acc_t>
struct BlendBackward {
  const host_t* grad;
  const host_t* host;
  const seed_t* seed;
  host_t* grad_host;
  seed_t* grad_seed;
  acc_t* alpha_direct;

  // Writes grad_host and grad_seed; returns the pack of grad.
  template <int N>
  __device__ Pack<host_t, N> gradients(int64_t first, int count, const acc_t (&alpha)[N]) const {
    const Pack<host_t, N> g = load<N>(grad, first, count);
    if (grad_host != nullptr) {
      Pack<host_t, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) result.value[j] = math::blend_grad_host(g.value[j], alpha[j]);
      store(grad_host, first, count, result);
    }
    if (grad_seed != nullptr) {
      Pack<seed_t, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) result.value[j] = math::blend_grad_seed<seed_t>(g.value[j], alpha[j]);
      store(grad_seed, first, count, result);
    }
    return g;
  }

  // The same, and what each element adds to grad_alpha.
  template <int N>
  __device__ Pack<acc_t, N> terms(int64_t first, int count, const acc_t (&alpha)[N]) const {
    const Pack<host_t, N> g = gradients<N>(first, count, alpha);
    const Pack<host_t, N> h = load<N>(host, first, count);
    const Pack<seed_t, N> s = load<N>(seed, first, count);
    Pack<acc_t, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const acc_t term = math::blend_grad_alpha<acc_t>(g.value[j], h.value[j], s.value[j]);
      result.value[j] = j < count && math::blend_alpha_is_live(alpha[j]) ? term : acc_t(0);
    }
    return result;
  }

  template <int N>
  __device__ void apply(int64_t first, int count, const acc_t (&alpha)[N]) const {
    if (alpha_direct == nullptr) {
      gradients<N>(first, count, alpha);
    } else {
      store(alpha_direct, first, count, terms<N>(first, count, alpha));
    }
  }
};

template <typename scalar_t, typename acc_t>
struct SeedGateBackward {
  const scalar_t* grad;
  scalar_t* out;

  template <int N>
  __device__ void apply(int64_t first, int count, const acc_t (&alpha)[N]) const {
    Pack<scalar_t, N> g = load<N>(grad, first, count);
#pragma unroll
    for (int j = 0; j < N; ++j) g.value[j] = math::seed_gate_grad(g.value[j], alpha[j]);
    store(out, first, count, g);
  }
};

// One alpha for each row of `inner` elements: a warp takes pieces of at most kPiece of them; slot (outer, part, mid) of
// `partial` gets a piece's sum.
template <typename acc_t, int N, class Op>
__global__ void __launch_bounds__(kBlock)
    row_sums_kernel(Op op, AlphaView<acc_t> view, int64_t rows, int64_t parts, double* partial) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t piece = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; piece < rows * parts;
       piece += warps) {
    const int64_t row = piece / parts, part = piece % parts, outer = row / view.mid, index = row % view.mid;
    const int64_t start = part * kPiece, length = min(kPiece, view.inner - start), base = row * view.inner + start;
    acc_t alpha[N];
#pragma unroll
    for (int j = 0; j < N; ++j) alpha[j] = view.values[index];
    double sum = 0;
    for (int64_t at = lane * N; at < length; at += kWarp * N) {
      const int count = length - at < N ? static_cast<int>(length - at) : N;
      const Pack<acc_t, N> terms = op.template terms<N>(base + at, count, alpha);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += static_cast<double>(terms.value[j]);
    }
    sum = cuda::warp_sum(sum);
    if (lane == 0) partial[(outer * parts + part) * view.mid + index] = sum;
  }
}

// An alpha for each of `mid` columns: a thread keeps the sums of N columns over the rows group, group + groups, ...
template <typename acc_t, int N, class Op>
__global__ void __launch_bounds__(kBlock)
    column_sums_kernel(Op op, AlphaView<acc_t> view, int64_t outer, int64_t groups, double* partial) {
  const int64_t columns = view.mid / N, stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; item < groups * columns; item += stride) {
    const int64_t group = item / columns, start = item % columns * N;
    acc_t alpha[N];
    double sums[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      alpha[j] = view.values[start + j];
      sums[j] = 0;
    }
    for (int64_t row = group; row < outer; row += groups) {
      const Pack<acc_t, N> terms = op.template terms<N>(row * view.mid + start, N, alpha);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += static_cast<double>(terms.value[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) partial[group * view.mid + start + j] = sums[j];
  }
}

template <typename acc_t, int N, class Op>
void launch_row_sums(const AlphaLayout& layout, int64_t parts, const Op& op, double* partial) {
  const int64_t rows = layout.outer * layout.mid;
  const unsigned grid = cuda::grid_for(rows * parts * kWarp, 1);
  TOLARIA_LAUNCH((row_sums_kernel<acc_t, N, Op>), grid, kBlock, op, AlphaView<acc_t>(layout), rows, parts, partial);
}

template <typename acc_t, int N, class Op>
void launch_column_sums(const AlphaLayout& layout, int64_t groups, const Op& op, double* partial) {
  const unsigned grid = cuda::grid_for(groups * (layout.mid / N), 1);
  TOLARIA_LAUNCH((column_sums_kernel<acc_t, N, Op>), grid, kBlock, op, AlphaView<acc_t>(layout), layout.outer, groups,
                 partial);
}

// Runs the op with room for its sums over alpha, and adds them up in a fixed order.
template <int N, typename acc_t, class Op>
at::Tensor run_with_alpha_sums(const AlphaLayout& layout, const at::Tensor& order, const at::Tensor& alpha,
                               bool aligned, Op op) {
  const bool is_uniform = layout.is_uniform();
  if (!is_uniform && layout.outer == 1) {
    at::Tensor terms = at::empty({layout.mid}, layout.values.options());
    op.alpha_direct = terms.mutable_data_ptr<acc_t>();
    cuda::for_each_pack<N, acc_t>(layout, aligned, op);
    return sums_to_alpha(terms, layout, order, alpha);
  }
  const int64_t parts = (layout.inner + kPiece - 1) / kPiece, packs = std::max<int64_t>(1, layout.mid / N);
  const int64_t groups = std::clamp<int64_t>(kColumnThreads / packs, 1, std::max<int64_t>(1, layout.outer / kColumnRows));
  const int64_t rows = is_uniform ? layout.outer * parts : groups;
  const auto options = order.options().dtype(at::kDouble);
  at::Tensor partial = at::empty({rows, layout.mid}, options), sums = at::empty({layout.mid}, options);
  auto* partial_data = partial.mutable_data_ptr<double>();
  const bool is_wide = aligned && (is_uniform ? layout.inner : layout.mid) % N == 0;
  if (is_uniform) {
    // A single row may end in a partial pack; further rows must begin on a pack.
    const bool is_single = layout.outer * layout.mid == 1;
    (is_wide || (aligned && is_single)) ? launch_row_sums<acc_t, N>(layout, parts, op, partial_data)
                                        : launch_row_sums<acc_t, 1>(layout, parts, op, partial_data);
  } else {
    is_wide ? launch_column_sums<acc_t, N>(layout, groups, op, partial_data)
            : launch_column_sums<acc_t, 1>(layout, groups, op, partial_data);
  }
  cuda::sum_rows(partial_data, rows, layout.mid, sums.mutable_data_ptr<double>());
  return sums_to_alpha(sums, layout, order, alpha);
}

// Whether packs of N elements fit the addresses of all the tensors that there are.
template <int N>
bool packs_fit(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) {
    return !t.defined() || cuda::is_aligned(t.const_data_ptr(), N * t.itemsize());
  });
}

}  // namespace

at::Tensor blend_cuda(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha) {
  check_pair("blend", host, seed);
  check_alpha("blend", alpha, "host", host);
  const c10::cuda::CUDAGuard guard(host.device());
  const auto host_type = host.scalar_type(), seed_type = seed.scalar_type();
  if (!is_fused_pair_of(host_type, seed_type)) return blend_promoted(&blend_cuda, host, seed, alpha);
  const BlendPlan plan(host, seed, alpha);
  if (plan.out.numel() == 0) return plan.out;
  TOLARIA_DISPATCH_PAIR(host_type, seed_type, "tolaria::blend", [&] {
    constexpr int N = kPackSize<host_t, seed_t>;
    const BlendForward<host_t, seed_t, acc_t> op{plan.host.const_data_ptr<host_t>(), plan.seed.const_data_ptr<seed_t>(),
                                                 plan.out.mutable_data_ptr<host_t>()};
    cuda::for_each_pack<N, acc_t>(plan.layout, packs_fit<N>({plan.host, plan.seed, plan.out}), op);
  });
  return plan.out;
}

TensorTriple blend_backward_cuda(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  check_blend_backward(grad, host, seed, alpha, seed_dtype, output_mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto host_dtype = grad.scalar_type();
  if (!is_fused_pair_of(host_dtype, seed_dtype)) {
    return blend_backward_promoted(&blend_backward_cuda, grad, host, seed, alpha, seed_dtype, output_mask);
  }
  const BlendBackwardPlan plan(grad, host, seed, alpha, seed_dtype, output_mask);
  at::Tensor grad_alpha;
  if (grad.numel() == 0) {
    if (output_mask[2]) grad_alpha = at::zeros(alpha.sizes(), alpha.options());
    return {plan.grad_host, plan.grad_seed, grad_alpha};
  }
  TOLARIA_DISPATCH_PAIR(host_dtype, seed_dtype, "tolaria::blend_backward", [&] {
    constexpr int N = kPackSize<host_t, seed_t>;
    const bool aligned = packs_fit<N>({plan.grad, plan.host, plan.seed, plan.grad_host, plan.grad_seed});
    const BlendBackward<host_t, seed_t, acc_t> op{
        plan.grad.const_data_ptr<host_t>(),
        data_or_null<host_t>(plan.host),
        data_or_null<seed_t>(plan.seed),
        mutable_data_or_null<host_t>(plan.grad_host),
        mutable_data_or_null<seed_t>(plan.grad_seed),
        nullptr,
    };
    if (output_mask[2]) {
      grad_alpha = run_with_alpha_sums<N, acc_t>(plan.layout, plan.order, alpha, aligned, op);
    } else {
      cuda::for_each_pack<N, acc_t>(plan.layout, aligned, op);
    }
  });
  return {plan.grad_host, plan.grad_seed, grad_alpha};
}

at::Tensor seed_gate_cuda(const at::Tensor& features, const at::Tensor& alpha) {
  check_floating("seed_gate", "features", features);
  check_alpha("seed_gate", alpha, "features", features);
  return at::empty_like(features).copy_(features);
}

at::Tensor seed_gate_backward_cuda(const at::Tensor& grad, const at::Tensor& alpha) {
  check_floating("seed_gate_backward", "grad", grad);
  check_alpha("seed_gate_backward", alpha, "grad", grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor out = at::empty_like(grad);
  if (out.numel() == 0) return out;
  const at::Tensor g = in_order_of(grad, out, grad.scalar_type());
  const AlphaLayout layout = make_alpha_layout(alpha, out, acc_type_of(grad.scalar_type(), grad.scalar_type()));
  TOLARIA_DISPATCH(grad.scalar_type(), "tolaria::seed_gate_backward", [&] {
    constexpr int N = kPackSize<scalar_t>;
    const SeedGateBackward<scalar_t, acc_t> op{g.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>()};
    cuda::for_each_pack<N, acc_t>(layout, packs_fit<N>({g, out}), op);
  });
  return out;
}

}  // namespace tolaria
