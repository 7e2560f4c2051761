// blend and seed_gate on CUDA: one pass forward, one pass backward, each array read and written once.
#include "math/blend.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <numeric>

#include "common/blend_plan.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "cuda/elementwise.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace tolaria {
namespace {

using cuda::AlphaAccess;
using cuda::AlphaView;
using cuda::kBlock;
using cuda::kWarp;
using cuda::load;
using cuda::Pack;
using cuda::store;

// Elements that a block takes at a time where rows have an alpha: the unit of a partial sum of grad_alpha.
constexpr int64_t kTile = 4096;
// Elements after which every dtype is on a sector of 32 bytes again.
constexpr int64_t kSectorElements = 16;
// Most threads that keep column sums, fewest rows for each and fewest periods of rows: partial sums stay a small part of
// what is moved.
constexpr int64_t kColumnThreads = 65536, kColumnRows = 32, kPeriods = 4;

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

// One alpha for each row of `inner` elements. Blocks take tiles of `tile` elements, whatever the rows, so that packs stay
// whole; each row gets a sum for each tile that it lies in, at most `parts` of them: slot (outer, part, mid) of `partial`.
struct RowTiles {
  int64_t tile, tiles, parts;

  explicit RowTiles(const AlphaLayout& layout) {
    const int64_t rows = layout.outer * layout.mid, n = rows * layout.inner;
    // Whole rows where many fit; kSectorElements of them begin and end on a sector, whatever their length.
    const int64_t whole = kTile / layout.inner / kSectorElements * kSectorElements;
    tile = rows > 1 && whole > 0 ? whole * layout.inner : kTile;
    tiles = (n + tile - 1) / tile;
    parts = tile % layout.inner == 0 ? 1 : rows == 1 ? tiles : (layout.inner + kTile - 2) / kTile + 1;
  }
};

template <typename acc_t, int N, class Op>
__global__ void __launch_bounds__(kBlock, 2)  // 2: said, since ptxas spills on 10.0 and 12.0 to hold a third block
    row_sums_kernel(Op op, AlphaView<acc_t> view, int64_t n, RowTiles tiles, double* partial) {
  __shared__ alignas(sizeof(Pack<acc_t, N>)) acc_t terms[kTile];
  const auto put = [&](int64_t row, int64_t tile, int64_t end, double sum) {
    const int64_t first = view.quotient(row * view.inner, tiles.tile), outer = view.quotient(row, view.mid);
    const int64_t index = row - outer * view.mid;
    double* slot = partial + outer * tiles.parts * view.mid + index;
    slot[(tile - first) * view.mid] = sum;
    if ((row + 1) * view.inner > end) return;  // the row goes on in the next tile
    for (int64_t part = tile - first + 1; part < tiles.parts; ++part) slot[part * view.mid] = 0.0;
  };
  for (int64_t tile = blockIdx.x; tile < tiles.tiles; tile += gridDim.x) {
    const int64_t begin = tile * tiles.tile, end = min(begin + tiles.tile, n);
    const int64_t first_row = view.row_of(begin), last_row = view.row_of(end - 1);
    const bool is_single = first_row == last_row;
    const acc_t first_alpha = view.values[view.index_of(first_row)];
    double sum = 0;
    for (int64_t at = begin + threadIdx.x * N; at < end; at += kBlock * N) {
      const int count = end - at < N ? static_cast<int>(end - at) : N;
      acc_t alpha[N];
      if (is_single) {
#pragma unroll
        for (int j = 0; j < N; ++j) alpha[j] = first_alpha;
      } else {
        view.template read<N, AlphaAccess::kWalk>(at, count, alpha);
      }
      const Pack<acc_t, N> pack = op.template terms<N>(at, count, alpha);
      if (is_single) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum += static_cast<double>(pack.value[j]);
      } else {
        *reinterpret_cast<Pack<acc_t, N>*>(terms + (at - begin)) = pack;
      }
    }
    if (is_single) {
      sum = cuda::block_sum(sum);
      if (threadIdx.x == 0) put(first_row, tile, end, sum);
      continue;
    }
    __syncthreads();
    // A warp for each row, or a thread where rows are short: their sums are then stored side by side.
    const bool is_short = view.inner < 2 * kWarp;
    const int lanes = is_short ? 1 : kWarp, lane = threadIdx.x % lanes;
    for (int64_t row = first_row + threadIdx.x / lanes; row <= last_row; row += kBlock / lanes) {
      const int64_t from = max(row * view.inner, begin) - begin, to = min((row + 1) * view.inner, end) - begin;
      double row_sum = 0;
      for (int64_t i = from + lane; i < to; i += lanes) row_sum += static_cast<double>(terms[i]);
      if (!is_short) row_sum = cuda::warp_sum(row_sum);
      if (lane == 0) put(row, tile, end, row_sum);
    }
    __syncthreads();
  }
}

// An alpha for each of `mid` columns. Walked flat, they repeat after `period` elements: as many rows as it takes to end on
// a pack, or on a sector where there are rows enough. A thread keeps the sums of a pack of the period over the periods
// group, group + groups, ...; each of the `rows` of a period is a row of partial sums.
struct ColumnPeriods {
  int64_t rows, period, groups;
  bool is_wide;

  ColumnPeriods(const AlphaLayout& layout, bool aligned, int pack) {
    const auto rows_to = [&](int64_t elements) { return elements / std::gcd(layout.mid, elements); };
    is_wide = aligned && (rows_to(pack) == 1 || layout.outer >= kPeriods * rows_to(pack));
    const bool is_long = layout.outer >= kColumnRows * rows_to(kSectorElements);
    rows = !is_wide ? 1 : rows_to(is_long ? kSectorElements : pack);
    period = rows * layout.mid;
    const int64_t packs = is_wide ? period / pack : period;
    groups = std::clamp<int64_t>(kColumnThreads / packs, 1, std::max<int64_t>(1, layout.outer / rows / kColumnRows));
  }
};

template <typename acc_t, int N, class Op>
__global__ void __launch_bounds__(kBlock)
    column_sums_kernel(Op op, AlphaView<acc_t> view, int64_t n, ColumnPeriods columns, double* partial) {
  const int64_t packs = columns.period / N, stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; item < columns.groups * packs;
       item += stride) {
    const int64_t group = item / packs, start = item % packs * N;
    acc_t alpha[N];
    Pack<double, N> sums;
    int64_t column = view.index_of(start);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      alpha[j] = view.values[column];
      sums.value[j] = 0;
      if (++column == view.mid) column = 0;
    }
    for (int64_t at = group * columns.period + start; at < n; at += columns.groups * columns.period) {
      const Pack<acc_t, N> terms = op.template terms<N>(at, n - at < N ? static_cast<int>(n - at) : N, alpha);
#pragma unroll
      for (int j = 0; j < N; ++j) sums.value[j] += static_cast<double>(terms.value[j]);
    }
    store(partial, group * columns.period + start, N, sums);
  }
}

// Runs the op with room for its sums over alpha, and adds them up in a fixed order.
template <int N, typename acc_t, class Op>
at::Tensor run_with_alpha_sums(const AlphaLayout& layout, const at::Tensor& order, const at::Tensor& alpha,
                               bool aligned, Op op) {
  if (!layout.is_uniform() && layout.outer == 1) {
    at::Tensor terms = at::empty({layout.mid}, layout.values.options());
    op.alpha_direct = terms.mutable_data_ptr<acc_t>();
    cuda::for_each_pack<N, acc_t>(layout, aligned, op);
    return sums_to_alpha(terms, layout, order, alpha);
  }
  const AlphaView<acc_t> view(layout);
  const int64_t n = layout.outer * layout.mid * layout.inner;
  const auto options = order.options().dtype(at::kDouble);
  at::Tensor partial;
  if (layout.is_uniform()) {
    const RowTiles tiles(layout);
    partial = at::empty({layout.outer * tiles.parts, layout.mid}, options);
    auto* data = partial.mutable_data_ptr<double>();
    const unsigned grid = cuda::grid_for(tiles.tiles * kBlock, 1);
    if (aligned) {
      TOLARIA_LAUNCH((row_sums_kernel<acc_t, N, Op>), grid, kBlock, op, view, n, tiles, data);
    } else {
      TOLARIA_LAUNCH((row_sums_kernel<acc_t, 1, Op>), grid, kBlock, op, view, n, tiles, data);
    }
  } else {
    const ColumnPeriods columns(layout, aligned, N);
    partial = at::empty({columns.groups * columns.rows, layout.mid}, options);
    auto* data = partial.mutable_data_ptr<double>();
    const unsigned grid = cuda::grid_for(columns.groups * columns.period, columns.is_wide ? N : 1);
    if (columns.is_wide) {
      TOLARIA_LAUNCH((column_sums_kernel<acc_t, N, Op>), grid, kBlock, op, view, n, columns, data);
    } else {
      TOLARIA_LAUNCH((column_sums_kernel<acc_t, 1, Op>), grid, kBlock, op, view, n, columns, data);
    }
  }
  if (partial.size(0) == 1) return sums_to_alpha(partial.view({layout.mid}), layout, order, alpha);
  at::Tensor sums = at::empty({layout.mid}, options);
  cuda::sum_rows(partial.const_data_ptr<double>(), partial.size(0), layout.mid, sums.mutable_data_ptr<double>());
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
  TOLARIA_DISPATCH_PAIR(host_type, seed_type, [&] {
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
  TOLARIA_DISPATCH_PAIR(host_dtype, seed_dtype, [&] {
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
