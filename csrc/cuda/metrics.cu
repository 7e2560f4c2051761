// classification_metrics_ on CUDA: one pass over the logits, in one launch. Each block adds up its rows; the last block to
// finish adds up the blocks, in their order. Class counts are integers, so that their order does not matter.
#include "math/metrics.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "common/dispatch.h"
#include "common/metrics_checks.h"
#include "cuda/elementwise.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace tolaria {
namespace {

using cuda::kBlock;
using cuda::kWarp;
using math::SoftmaxSum;

// Blocks that a multiprocessor is to hold: said, since ptxas otherwise spills to hold one more.
template <typename acc_t>
constexpr int kResident = sizeof(acc_t) == 8 ? 2 : 4;  // float64 takes more registers than four would leave
// Classes from which a row is worth a whole block rather than a warp.
constexpr int64_t kBlockClasses = 4096;

// What the kernels share; `partial` has kMetricsFields doubles for each block.
struct MetricsTask {
  LogitRows rows;
  const int64_t* labels;
  int64_t ignore_index, topk;
  int64_t counts;            // places of class counts in acc: two for each class, or none
  int64_t* class_counts;     // correct, then total
  unsigned* finished;        // blocks
  double* partial;
  double* acc;
};

// The sums of the rows that a thread finishes.
struct RowSums {
  double field[math::kMetricsFields] = {};

  // Whether the row is to be looked at; if not, it is counted here where `is_counter`.
  __device__ bool begin(const MetricsTask& task, int64_t label, bool is_counter) {
    if (label == task.ignore_index) return false;
    if (label >= 0 && label < task.rows.classes) return true;
    if (is_counter) field[math::kInvalid] += 1;
    return false;
  }

  template <typename acc_t>
  __device__ void add(const MetricsTask& task, int64_t label, const SoftmaxSum<acc_t>& softmax, acc_t target,
                      int64_t rank) {
    field[math::kLossSum] += softmax.loss(target);
    field[math::kCount] += 1;
    field[math::kCorrect] += rank == 0;
    field[math::kTopkCorrect] += rank < task.topk;
    if (task.counts == 0) return;
    count(task.class_counts + task.rows.classes + label);
    if (rank == 0) count(task.class_counts + label);
  }

  static __device__ void count(int64_t* place) { atomicAdd(reinterpret_cast<unsigned long long*>(place), 1ull); }

  // All threads of the block call it once, after their rows.
  __device__ void finish(const MetricsTask& task) {
    double* own = task.partial + static_cast<int64_t>(blockIdx.x) * math::kMetricsFields;
#pragma unroll
    for (int f = 0; f < math::kMetricsFields; ++f) {
      const double sum = cuda::block_sum(field[f]);
      if (threadIdx.x == 0) own[f] = sum;
    }
    if (!cuda::is_last_block(task.finished, gridDim.x)) return;
    for (int64_t i = threadIdx.x; i < task.counts; i += kBlock) {
      task.acc[math::kMetricsFields + i] += static_cast<double>(__ldcg(task.class_counts + i));
    }
#pragma unroll
    for (int f = 0; f < math::kMetricsFields; ++f) {
      double sum = 0;
      for (unsigned b = threadIdx.x; b < gridDim.x; b += kBlock) sum += __ldcg(task.partial + b * math::kMetricsFields + f);
      sum = cuda::block_sum(sum);
      if (threadIdx.x == 0) task.acc[f] += sum;
    }
  }
};

template <typename acc_t>
__device__ inline void take_in(acc_t logit, acc_t target, bool is_earlier, bool is_label, SoftmaxSum<acc_t>& softmax,
                               int64_t& rank) {
  softmax.raise(logit);
  softmax.sum += static_cast<double>(math::exp_nonpositive(logit - softmax.origin()));
  rank += !is_label && math::outranks(logit, target, is_earlier);
}

// The logits that lane `lane` of `lanes` takes from a row of adjacent classes: packs of 16 bytes where they lie whole in
// the row, its ends one by one.
template <typename scalar_t, typename acc_t>
__device__ inline void lane_part(const scalar_t* x, int64_t classes, int64_t label, acc_t target, int lane, int lanes,
                                 SoftmaxSum<acc_t>& softmax, int64_t& rank) {
  constexpr int N = 16 / sizeof(scalar_t);
  const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(scalar_t));
  for (int64_t first = static_cast<int64_t>(lane) * N - skew; first < classes; first += static_cast<int64_t>(lanes) * N) {
    if (first >= 0 && first + N <= classes) {
      const auto pack = cuda::load_whole<N>(x + first);
      acc_t peak = -INFINITY;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const acc_t value = static_cast<acc_t>(pack.value[j]);
        peak = value > peak ? value : peak;
      }
      softmax.raise(peak);
      acc_t sum = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const acc_t value = static_cast<acc_t>(pack.value[j]);
        sum += math::exp_nonpositive(value - softmax.origin());
        rank += first + j != label && math::outranks(value, target, first + j < label);
      }
      softmax.sum += static_cast<double>(sum);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int64_t c = first + j;
        if (c >= 0 && c < classes) take_in(static_cast<acc_t>(x[c]), target, c < label, c == label, softmax, rank);
      }
    }
  }
}

template <typename acc_t>
__device__ inline void warp_merge(SoftmaxSum<acc_t>& softmax, int64_t& rank) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    SoftmaxSum<acc_t> other;
    other.max = __shfl_down_sync(cuda::kAllLanes, softmax.max, offset);
    other.sum = __shfl_down_sync(cuda::kAllLanes, softmax.sum, offset);
    rank += __shfl_down_sync(cuda::kAllLanes, rank, offset);
    softmax.merge(other);
  }
}

template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kBlock, kResident<acc_t>) warp_rows_kernel(MetricsTask task, const scalar_t* logits) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  RowSums sums;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; row < task.rows.rows;
       row += warps) {
    const int64_t label = task.labels[row];
    if (!sums.begin(task, label, lane == 0)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    lane_part(x, task.rows.classes, label, target, lane, kWarp, softmax, rank);
    warp_merge(softmax, rank);
    if (lane == 0) sums.add(task, label, softmax, target, rank);
  }
  sums.finish(task);
}

template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kBlock, kResident<acc_t>) block_rows_kernel(MetricsTask task, const scalar_t* logits) {
  __shared__ acc_t peaks[kBlock / kWarp];
  __shared__ double totals[kBlock / kWarp];
  __shared__ int64_t ranks[kBlock / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  RowSums sums;
  for (int64_t row = blockIdx.x; row < task.rows.rows; row += gridDim.x) {
    const int64_t label = task.labels[row];
    if (!sums.begin(task, label, threadIdx.x == 0)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    lane_part(x, task.rows.classes, label, target, threadIdx.x, kBlock, softmax, rank);
    warp_merge(softmax, rank);
    if (lane == 0) {
      peaks[warp] = softmax.max;
      totals[warp] = softmax.sum;
      ranks[warp] = rank;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kBlock / kWarp; ++w) {
        SoftmaxSum<acc_t> other;
        other.max = peaks[w];
        other.sum = totals[w];
        softmax.merge(other);
        rank += ranks[w];
      }
      sums.add(task, label, softmax, target, rank);
    }
    __syncthreads();
  }
  sums.finish(task);
}

// Rows beside each other in memory, classes apart: a thread for each row.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kBlock, kResident<acc_t>) strided_rows_kernel(MetricsTask task, const scalar_t* logits) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  RowSums sums;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; row < task.rows.rows; row += stride) {
    const int64_t label = task.labels[row];
    if (!sums.begin(task, label, true)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label * task.rows.stride]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    for (int64_t c = 0; c < task.rows.classes; ++c) {
      take_in(static_cast<acc_t>(x[c * task.rows.stride]), target, c < label, c == label, softmax, rank);
    }
    sums.add(task, label, softmax, target, rank);
  }
  sums.finish(task);
}

}  // namespace

void classification_metrics_cuda(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                 int64_t ignore_index, int64_t topk) {
  check_metrics(acc, logits, labels, topk);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor view = as_rows(logits);
  const at::Tensor index = labels.to(at::kLong).contiguous();
  LogitRows rows = logit_rows(view);
  if (rows.rows == 0) return;
  const bool are_rows_adjacent = rows.inner > 1 ? rows.inner_step == 1 : rows.outer_step == 1;
  if (rows.stride != 1 && !are_rows_adjacent) {  // lanes would share no sector
    view = view.contiguous();
    rows = logit_rows(view);
  }
  const bool is_strided = rows.stride != 1 && rows.classes > 1, is_long = rows.classes >= kBlockClasses;
  const int64_t threads = is_strided ? 1 : is_long ? kBlock : kWarp;
  const unsigned grid = cuda::grid_for(rows.rows * threads, 1);
  const int64_t counts = acc.size(0) - math::kMetricsFields;
  at::Tensor integers = at::zeros({counts + 1}, acc.options().dtype(at::kLong));
  at::Tensor partial = at::empty({static_cast<int64_t>(grid) * math::kMetricsFields}, acc.options());
  auto* class_counts = integers.mutable_data_ptr<int64_t>();
  const MetricsTask task{rows,
                         index.const_data_ptr<int64_t>(),
                         ignore_index,
                         topk,
                         counts,
                         class_counts,
                         reinterpret_cast<unsigned*>(class_counts + counts),
                         partial.mutable_data_ptr<double>(),
                         acc.mutable_data_ptr<double>()};
  TOLARIA_DISPATCH(logits.scalar_type(), "tolaria::classification_metrics_", [&] {
    const auto* data = view.const_data_ptr<scalar_t>();
    if (is_strided) {
      TOLARIA_LAUNCH((strided_rows_kernel<scalar_t, acc_t>), grid, kBlock, task, data);
    } else if (is_long) {
      TOLARIA_LAUNCH((block_rows_kernel<scalar_t, acc_t>), grid, kBlock, task, data);
    } else {
      TOLARIA_LAUNCH((warp_rows_kernel<scalar_t, acc_t>), grid, kBlock, task, data);
    }
  });
}

}  // namespace tolaria
