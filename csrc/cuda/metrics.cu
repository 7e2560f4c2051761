// classification_metrics_ on CUDA: one pass over the logits leaves a result for each row; a second, small launch adds
// the rows up in a fixed order. Class counts are integers, so that their order does not matter.
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

// Classes from which a row is worth a whole block rather than a warp.
constexpr int64_t kBlockClasses = 4096;

struct RowResult {
  double loss;
  int64_t rank;  // or one of the two below
};
constexpr int64_t kIgnored = -1, kInvalidLabel = -2;

struct MetricsTask {
  LogitRows rows;
  const int64_t* labels;
  int64_t ignore_index;
  RowResult* results;
  int32_t* class_counts;  // correct, then total; null without per-class counts

  // The label's state: whether the row is to be looked at.
  __device__ bool begin(int64_t row, int64_t label) const {
    if (label != ignore_index && label >= 0 && label < rows.classes) return true;
    results[row] = {0.0, label == ignore_index ? kIgnored : kInvalidLabel};
    return false;
  }

  template <typename acc_t>
  __device__ void finish(int64_t row, int64_t label, const SoftmaxSum<acc_t>& softmax, acc_t target,
                         int64_t rank) const {
    results[row] = {softmax.loss(target), rank};
    if (class_counts == nullptr) return;
    if (rank == 0) atomicAdd(class_counts + label, 1);
    atomicAdd(class_counts + rows.classes + label, 1);
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
__global__ void __launch_bounds__(kBlock) warp_rows_kernel(MetricsTask task, const scalar_t* logits) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; row < task.rows.rows;
       row += warps) {
    const int64_t label = task.labels[row];
    if (!task.begin(row, label)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    lane_part(x, task.rows.classes, label, target, lane, kWarp, softmax, rank);
    warp_merge(softmax, rank);
    if (lane == 0) task.finish(row, label, softmax, target, rank);
  }
}

template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kBlock) block_rows_kernel(MetricsTask task, const scalar_t* logits) {
  __shared__ acc_t peaks[kBlock / kWarp];
  __shared__ double sums[kBlock / kWarp];
  __shared__ int64_t ranks[kBlock / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t row = blockIdx.x; row < task.rows.rows; row += gridDim.x) {
    const int64_t label = task.labels[row];
    if (!task.begin(row, label)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    lane_part(x, task.rows.classes, label, target, threadIdx.x, kBlock, softmax, rank);
    warp_merge(softmax, rank);
    if (lane == 0) {
      peaks[warp] = softmax.max;
      sums[warp] = softmax.sum;
      ranks[warp] = rank;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kBlock / kWarp; ++w) {
        SoftmaxSum<acc_t> other;
        other.max = peaks[w];
        other.sum = sums[w];
        softmax.merge(other);
        rank += ranks[w];
      }
      task.finish(row, label, softmax, target, rank);
    }
    __syncthreads();
  }
}

// Rows beside each other in memory, classes apart: a thread for each row.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kBlock) strided_rows_kernel(MetricsTask task, const scalar_t* logits) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; row < task.rows.rows; row += stride) {
    const int64_t label = task.labels[row];
    if (!task.begin(row, label)) continue;
    const scalar_t* x = logits + task.rows.offset(row);
    const acc_t target = static_cast<acc_t>(x[label * task.rows.stride]);
    SoftmaxSum<acc_t> softmax;
    int64_t rank = 0;
    for (int64_t c = 0; c < task.rows.classes; ++c) {
      take_in(static_cast<acc_t>(x[c * task.rows.stride]), target, c < label, c == label, softmax, rank);
    }
    task.finish(row, label, softmax, target, rank);
  }
}

// Block 0 adds up the rows; all blocks add the class counts.
__global__ void __launch_bounds__(kBlock)
    add_rows_kernel(const RowResult* results, int64_t rows, const int32_t* class_counts, int64_t counts, int64_t topk,
                    double* acc) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < counts; i += stride) {
    acc[math::kMetricsFields + i] += class_counts[i];
  }
  if (blockIdx.x != 0) return;
  double sums[math::kMetricsFields] = {};
  for (int64_t row = threadIdx.x; row < rows; row += kBlock) {
    const RowResult result = results[row];
    sums[math::kLossSum] += result.loss;
    sums[math::kCount] += result.rank >= 0;
    sums[math::kCorrect] += result.rank == 0;
    sums[math::kTopkCorrect] += result.rank >= 0 && result.rank < topk;
    sums[math::kInvalid] += result.rank == kInvalidLabel;
  }
#pragma unroll
  for (int field = 0; field < math::kMetricsFields; ++field) {
    const double sum = cuda::block_sum(sums[field]);
    if (threadIdx.x == 0) acc[field] += sum;
    __syncthreads();
  }
}

}  // namespace

void classification_metrics_cuda(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                 int64_t ignore_index, int64_t topk) {
  check_metrics(acc, logits, labels, topk);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor view = as_rows(logits), index = labels.to(at::kLong).contiguous();
  const LogitRows rows = logit_rows(view);
  if (rows.rows == 0) return;
  const int64_t counts = acc.size(0) - math::kMetricsFields;
  at::Tensor results = at::empty({rows.rows * static_cast<int64_t>(sizeof(RowResult))}, acc.options().dtype(at::kByte));
  at::Tensor class_counts = at::zeros({counts}, acc.options().dtype(at::kInt));
  const MetricsTask task{rows, index.const_data_ptr<int64_t>(), ignore_index,
                         reinterpret_cast<RowResult*>(results.mutable_data_ptr()),
                         counts == 0 ? nullptr : class_counts.mutable_data_ptr<int32_t>()};
  TOLARIA_DISPATCH(logits.scalar_type(), "tolaria::classification_metrics_", [&] {
    const auto* data = view.const_data_ptr<scalar_t>();
    if (rows.stride != 1) {
      TOLARIA_LAUNCH((strided_rows_kernel<scalar_t, acc_t>), cuda::grid_for(rows.rows, 1), kBlock, task, data);
    } else if (rows.classes < kBlockClasses) {
      TOLARIA_LAUNCH((warp_rows_kernel<scalar_t, acc_t>), cuda::grid_for(rows.rows * kWarp, 1), kBlock, task, data);
    } else {
      TOLARIA_LAUNCH((block_rows_kernel<scalar_t, acc_t>), cuda::grid_for(rows.rows * kBlock, 1), kBlock, task, data);
    }
  });
  TOLARIA_LAUNCH(add_rows_kernel, cuda::grid_for(counts, 1), kBlock, task.results, rows.rows, task.class_counts, counts,
                 topk, acc.mutable_data_ptr<double>());
}

}  // namespace tolaria
