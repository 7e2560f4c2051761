// tolaria::governor_step_ and governor_order_ on CUDA: one thread a governor; the rule itself is in math/governor.h.
#include <ATen/core/Tensor.h>

#include "common/governor_batch.h"
#include "cuda/launch.cuh"
#include "ops.h"

namespace tolaria {
namespace {

// Nothing is shared between threads: each reads and writes its own column and its own row of the mailbox.
__global__ void governor_step_kernel(GovernorBatch batch, const double* config, GovernorLosses losses) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batch.n || !losses.is_active(i)) return;
  const math::Governor g = batch[i];
  const math::Sample<math::Governor> sample = losses[i];
  math::judge(g, config, sample, math::loss_moments(g), math::gradient_moments(g, sample));
}

__global__ void governor_order_kernel(math::Governor g, const double* config, math::Order order, math::Reason reason,
                                      double tensor) {
  math::give_order(g, config, order, reason, tensor);
}

}  // namespace

void governor_step_cuda(at::Tensor& state, const at::Tensor& config, const at::Tensor& loss,
                        const std::optional<at::Tensor>& nonfinite, const std::optional<at::Tensor>& active,
                        const std::optional<at::Tensor>& mailbox, const std::optional<at::Tensor>& gradient,
                        const std::optional<at::Tensor>& state_bad) {
  const GovernorBatch batch = governor_batch(state, mailbox);
  check_governor_config(state, config);
  const GovernorArguments arguments(state, loss, nonfinite, active, gradient, state_bad);
  const c10::cuda::CUDAGuard guard(state.device());  // after the checks: a state on the CPU is their business
  // One thread a governor: for the usual single one a warp is the smallest block there is.
  const int block = batch.n <= 32 ? 32 : 128;
  TOLARIA_LAUNCH(governor_step_kernel, static_cast<unsigned>((batch.n + block - 1) / block), block, batch,
                 config.const_data_ptr<double>(), arguments.losses);
}

void governor_order_cuda(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                         int64_t tensor_index, const std::optional<at::Tensor>& mailbox) {
  const math::Governor g = governor_at(state, column, mailbox);
  check_governor_config(state, config);
  check_order(order, reason);
  const c10::cuda::CUDAGuard guard(state.device());
  TOLARIA_LAUNCH(governor_order_kernel, 1, 1, g, config.const_data_ptr<double>(), static_cast<math::Order>(order),
                 static_cast<math::Reason>(reason), static_cast<double>(tensor_index));
}

}  // namespace tolaria
