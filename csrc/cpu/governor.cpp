// tolaria::governor_step_ and governor_order_ on the CPU. The rule itself is in math/governor.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/governor_batch.h"
#include "common/multiversion.h"
#include "ops.h"

namespace tolaria {
namespace {

constexpr int kLanes = 8;          // governors whose windows are summed side by side: two 256-bit vectors of float64
constexpr int64_t kRowGrain = 256;  // governors per task; one costs about 50 ns, a task hand-over several us

// Welford over the windows of kLanes neighbouring governors, the same operations lane by lane as window_moments.
TOLARIA_MULTIVERSION void lane_moments(const double* sizes, const double* losses, int64_t stride, int window,
                                       double* __restrict mean, double* __restrict m2) {
  for (int l = 0; l < kLanes; ++l) mean[l] = m2[l] = 0.0;
  for (int i = 0; i < window; ++i) {
    const double* x = losses + i * stride;
    for (int l = 0; l < kLanes; ++l) {
      const math::Moments next = math::welford({mean[l], m2[l]}, x[l], i + 1.0);
      mean[l] = i < sizes[l] ? next.mean : mean[l];
      m2[l] = i < sizes[l] ? next.m2 : m2[l];
    }
  }
}

void judge_range(const GovernorBatch& batch, const double* config, const GovernorLosses& losses, int64_t begin, int64_t end) {
  double mean[kLanes], m2[kLanes];
  for (int64_t i = begin; i < end; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, end - i));
    if (lanes == kLanes) {
      const math::Governor first = batch[i];
      lane_moments(&first.live(math::memory::history_size), &first.live(first.losses()), batch.stride, batch.window, mean,
                   m2);
    }
    for (int l = 0; l < lanes; ++l) {
      if (!losses.is_active(i + l)) continue;
      const math::Governor g = batch[i + l];
      const math::Moments m = lanes == kLanes ? math::Moments{mean[l], m2[l]} : math::loss_moments(g);
      math::judge(g, config, m, losses[i + l], losses.is_nonfinite(i + l), losses.gradient_at(i + l));
    }
  }
}

}  // namespace

std::vector<std::string> governor_fields() {
#define TOLARIA_NAME(name) #name,
  std::vector<std::string> names;
  const auto add = [&names](const char* group, std::initializer_list<const char*> fields) {
    for (const char* field : fields) names.push_back(std::string(group) + "." + field);
  };
  add("state", {TOLARIA_GOVERNOR_FIELDS(TOLARIA_NAME)});
  add("memory", {TOLARIA_GOVERNOR_MEMORY(TOLARIA_NAME)});
  add("config", {TOLARIA_GOVERNOR_CONFIG(TOLARIA_NAME)});
  add("status", {TOLARIA_GOVERNOR_STATUS(TOLARIA_NAME)});
  add("record", {TOLARIA_GOVERNOR_RECORD(TOLARIA_NAME)});
#undef TOLARIA_NAME
  return names;
}

void governor_step_cpu(at::Tensor& state, const at::Tensor& config, const at::Tensor& loss,
                       const std::optional<at::Tensor>& nonfinite, const std::optional<at::Tensor>& active,
                       const std::optional<at::Tensor>& mailbox, const std::optional<at::Tensor>& gradient) {
  const GovernorBatch batch = governor_batch(state, mailbox);
  check_governor_config(state, config);
  const GovernorArguments arguments(state, loss, nonfinite, active, gradient);
  const GovernorLosses& losses = arguments.losses;
  const double* c = config.const_data_ptr<double>();
  if (batch.n <= kRowGrain) return judge_range(batch, c, losses, 0, batch.n);
  at::parallel_for(0, batch.n, kRowGrain, [&](int64_t begin, int64_t end) { judge_range(batch, c, losses, begin, end); });
}

void governor_order_cpu(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                        int64_t tensor_index, const std::optional<at::Tensor>& mailbox) {
  const GovernorBatch batch = governor_batch(state, mailbox);
  check_governor_config(state, config);
  check_column(state, column);
  math::give_order(batch[column], config.const_data_ptr<double>(), static_cast<math::Order>(order),
                   static_cast<math::Reason>(reason), static_cast<double>(tensor_index));
}

}  // namespace tolaria
