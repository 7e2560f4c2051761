// tolaria::governor_step_ and governor_order_ on the CPU. The rule itself is in math/governor.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "common/governor_batch.h"
#include "cpu/governor_lanes.h"
#include "ops.h"

namespace tolaria {
namespace {

// Governors per task: with the second thread 1,024 take 22 us instead of 31, with a mailbox 38 instead of 42, and about
// half of the time where it has to be woken up (Zen 3, two cores). For fewer there is less to win.
constexpr int64_t kRowGrain = 512;

void judge_one(const GovernorBatch& batch, const double* c, const GovernorLosses& losses, int64_t i) {
  if (!losses.is_active(i)) return;
  const math::Governor g = batch[i];
  const math::Sample<math::Governor> sample = losses[i];
  math::judge(g, c, sample, math::loss_moments(g), math::gradient_moments(g, sample));
}

#ifdef TOLARIA_HAS_LANES
template <int kCount>
void read_samples(const GovernorLosses& losses, int64_t begin, cpu::GovernorBlock<kCount>& block) {
  block.has_gradient = losses.gradient != nullptr;
  for (int l = 0; l < kCount; ++l) {
    const math::Sample<math::Governor> sample = losses[begin + l];
    block.loss[l] = sample.loss;
    block.is_flagged[l] = sample.is_flagged;
    block.is_active[l] = losses.is_active(begin + l);
    block.gradient_norm[l] = sample.gradient_norm;
  }
}

// Copies live memories into those of slots; side by side where they go into the same one, as they do in step.
template <int kCount>
void copy_captured(const GovernorBatch& batch, int64_t begin, const int (&captured)[kCount]) {
  const math::Governor first = batch[begin];
  if (std::all_of(captured, captured + kCount, [&](int memory) { return memory == captured[0]; })) {
    if (captured[0] == 0) return;
    for (int m = 0; m < first.memory_size(); ++m) {
      std::memcpy(&first.recall(captured[0], m), &first.recall(0, m), kCount * sizeof(double));
    }
    return;
  }
  for (int l = 0; l < kCount; ++l) {
    if (captured[l] > 0) math::copy_memory(batch[begin + l], captured[l], 0);
  }
}

// What is left of clean steps, which differs between governors, and the steps that are not clean.
template <int kCount>
void finish_block(const GovernorBatch& batch, const double* c, const GovernorLosses& losses, int64_t begin,
                  const cpu::GovernorBlock<kCount>& block) {
  int captured[kCount] = {};
  for (int l = 0; l < kCount; ++l) {
    const math::Governor g = batch[begin + l];
    if (block.is_clean[l]) {
      math::append(g, math::memory::history_size, g.losses(), block.loss[l]);
      if (block.has_gradient) math::append(g, math::memory::gradient_size, g.gradients(), block.gradient_norm[l]);
      math::write_verdict_status(g, {block.reason[l], block.rollback[l], block.tensor_index[l]});
      captured[l] = math::advance_slots(g, c, true, false, false);
    } else if (block.is_active[l] != 0.0) {
      math::judge(g, c, losses[begin + l], {block.mean[l], block.m2[l]},
                  {block.gradient_mean[l], block.gradient_m2[l]});
    }
  }
  copy_captured(batch, begin, captured);
}

// Judges whole blocks of kVectors registers; returns where they end.
template <int kBytes, int kVectors>
int64_t judge_blocks(const GovernorBatch& batch, const double* c, const GovernorLosses& losses, int64_t begin,
                     int64_t end) {
  using Kernel = cpu::JudgeLanes<kBytes, kVectors>;
  typename Kernel::Block block;
  for (; begin + Kernel::kCount <= end; begin += Kernel::kCount) {
    read_samples(losses, begin, block);
#ifdef TOLARIA_HAS_X86_VARIANTS
    // Scalar code stays out of the kernel: a call from AVX2 code to SSE code and back costs hundreds of cycles.
    if constexpr (kBytes == 32) {
      using Block = typename Kernel::Block;
      cpu::run_avx2<Kernel, const GovernorBatch&, const double*, int64_t, Block&>(batch, c, begin, block);
    } else
#endif
      Kernel::run(batch, c, begin, block);
    finish_block(batch, c, losses, begin, block);
  }
  return begin;
}

// Blocks of four registers, then of one.
template <int kBytes>
int64_t judge_lanes(const GovernorBatch& batch, const double* c, const GovernorLosses& losses, int64_t begin,
                    int64_t end) {
  begin = judge_blocks<kBytes, 4>(batch, c, losses, begin, end);
  return judge_blocks<kBytes, 1>(batch, c, losses, begin, end);
}
#endif

void judge_range(const GovernorBatch& batch, const double* c, const GovernorLosses& losses, int64_t begin, int64_t end) {
#if defined(TOLARIA_HAS_X86_VARIANTS) && defined(TOLARIA_HAS_LANES)
  const bool is_wide = cpu::kIsa != cpu::Isa::kBaseline;
  begin = is_wide ? judge_lanes<32>(batch, c, losses, begin, end) : judge_lanes<16>(batch, c, losses, begin, end);
#elif defined(TOLARIA_HAS_LANES)
  begin = judge_lanes<16>(batch, c, losses, begin, end);
#endif
  for (; begin < end; ++begin) judge_one(batch, c, losses, begin);
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
                       const std::optional<at::Tensor>& mailbox, const std::optional<at::Tensor>& gradient,
                       const std::optional<at::Tensor>& state_bad) {
  const GovernorBatch batch = governor_batch(state, mailbox);
  check_governor_config(state, config);
  const GovernorArguments arguments(state, loss, nonfinite, active, gradient, state_bad);
  const GovernorLosses& losses = arguments.losses;
  const double* c = config.const_data_ptr<double>();
  if (batch.n <= kRowGrain) return judge_range(batch, c, losses, 0, batch.n);
  at::parallel_for(0, batch.n, kRowGrain, [&](int64_t begin, int64_t end) { judge_range(batch, c, losses, begin, end); });
}

void governor_order_cpu(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                        int64_t tensor_index, const std::optional<at::Tensor>& mailbox) {
  const GovernorBatch batch = governor_batch(state, mailbox);
  check_governor_config(state, config);
  check_order(order, reason);
  check_column(state, column);
  math::give_order(batch[column], config.const_data_ptr<double>(), static_cast<math::Order>(order),
                   static_cast<math::Reason>(reason), static_cast<double>(tensor_index));
}

}  // namespace tolaria
