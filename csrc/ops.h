// The C++ prototypes behind the schemas of registration.cpp, one block per op; suffix _cpu, _cuda or _autograd.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tolaria {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using TensorTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Gives back to the system what the pool of large CPU outputs keeps idle; bytes.
int64_t release_idle_outputs();

// Bytes of the last cache before memory that one core sees, as the system tells; found once.
int64_t last_level_cache();
// A pass that reads and writes more bytes than this writes past the caches.
int64_t stream_above();
// Sets that; returns the former.
int64_t set_stream_above(int64_t bytes);

// blend: host and seed of the backward are only needed for grad_alpha; a gradient not asked for is undefined.
at::Tensor blend_cpu(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha);
at::Tensor blend_autograd(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha);
TensorTriple blend_backward_cpu(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                at::ScalarType seed_dtype, std::array<bool, 3> output_mask);
at::Tensor blend_cuda(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha);
TensorTriple blend_backward_cuda(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                 const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                 at::ScalarType seed_dtype, std::array<bool, 3> output_mask);
TensorTriple blend_backward_autograd(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                     const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                     at::ScalarType seed_dtype, std::array<bool, 3> output_mask);
// The same with grad_host written over grad. The _copied forms serve devices without a kernel of their own for it.
TensorPair blend_backward_inplace_cpu(at::Tensor& grad, const std::optional<at::Tensor>& host,
                                      const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                      at::ScalarType seed_dtype, std::array<bool, 2> output_mask);
TensorPair blend_backward_inplace_copied(at::Tensor& grad, const std::optional<at::Tensor>& host,
                                         const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                         at::ScalarType seed_dtype, std::array<bool, 2> output_mask);

// seed_gate
at::Tensor seed_gate_cpu(const at::Tensor& features, const at::Tensor& alpha);
at::Tensor seed_gate_autograd(const at::Tensor& features, const at::Tensor& alpha);
at::Tensor seed_gate_backward_cpu(const at::Tensor& grad, const at::Tensor& alpha);
at::Tensor seed_gate_cuda(const at::Tensor& features, const at::Tensor& alpha);
at::Tensor seed_gate_backward_cuda(const at::Tensor& grad, const at::Tensor& alpha);
at::Tensor seed_gate_backward_autograd(const at::Tensor& grad, const at::Tensor& alpha);
void seed_gate_backward_inplace_cpu(at::Tensor& grad, const at::Tensor& alpha);
void seed_gate_backward_inplace_copied(at::Tensor& grad, const at::Tensor& alpha);

// straight_through
at::Tensor straight_through_cpu(const at::Tensor& host, const at::Tensor& seed);
at::Tensor straight_through_cuda(const at::Tensor& host, const at::Tensor& seed);
at::Tensor straight_through_autograd(const at::Tensor& host, const at::Tensor& seed);

// tensor_stats: `refuse` serves the layouts that are an error
at::Tensor tensor_stats_cpu(const c10::List<std::optional<at::Tensor>>& tensors);
at::Tensor tensor_stats_cuda(const c10::List<std::optional<at::Tensor>>& tensors);
at::Tensor tensor_stats_autograd(const c10::List<std::optional<at::Tensor>>& tensors);
at::Tensor tensor_stats_refuse(const c10::List<std::optional<at::Tensor>>& tensors);

// classification_metrics_: `fields` names the accumulator's first places
std::vector<std::string> metrics_fields();
void classification_metrics_cpu(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                int64_t ignore_index, int64_t topk);
void classification_metrics_cuda(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                 int64_t ignore_index, int64_t topk);
void classification_metrics_autograd(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                     int64_t ignore_index, int64_t topk);

// governor: names of all tensor layouts; one judgement of n governors; one order from outside the rule
std::vector<std::string> governor_fields();
void governor_step_cpu(at::Tensor& state, const at::Tensor& config, const at::Tensor& loss,
                       const std::optional<at::Tensor>& nonfinite, const std::optional<at::Tensor>& active,
                       const std::optional<at::Tensor>& mailbox, const std::optional<at::Tensor>& gradient,
                       const std::optional<at::Tensor>& state_bad);
void governor_order_cpu(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                        int64_t tensor_index, const std::optional<at::Tensor>& mailbox);

// snapshot: copy live bytes to the ordered slot; copy the last known good slot back
void snapshot_capture_cpu(at::Tensor& state, int64_t column, const at::Tensor& table, int64_t part,
                          const std::optional<at::Tensor>& mailbox, int64_t ticket, bool aside);
void snapshot_restore_cpu(at::Tensor& state, int64_t column, const at::Tensor& config, const at::Tensor& table,
                          const std::optional<at::Tensor>& mailbox);

#ifdef TOLARIA_WITH_CUDA
// Page-locked host memory of exactly so many bytes, uint8, which the device reads and writes by the host's addresses.
at::Tensor page_locked(int64_t nbytes);

void governor_step_cuda(at::Tensor& state, const at::Tensor& config, const at::Tensor& loss,
                        const std::optional<at::Tensor>& nonfinite, const std::optional<at::Tensor>& active,
                        const std::optional<at::Tensor>& mailbox, const std::optional<at::Tensor>& gradient,
                        const std::optional<at::Tensor>& state_bad);
void governor_order_cuda(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                         int64_t tensor_index, const std::optional<at::Tensor>& mailbox);
void snapshot_capture_cuda(at::Tensor& state, int64_t column, const at::Tensor& table, int64_t part,
                           const std::optional<at::Tensor>& mailbox, int64_t ticket, bool aside);
void snapshot_restore_cuda(at::Tensor& state, int64_t column, const at::Tensor& config, const at::Tensor& table,
                           const std::optional<at::Tensor>& mailbox);
#endif

}  // namespace tolaria
