// The C++ prototypes behind the schemas of registration.cpp, one block per op; suffix _cpu, _cuda or _autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace tolaria {

// governor: names of all tensor layouts; one judgement of n governors; one order from outside the rule
std::vector<std::string> governor_fields();
void governor_step_cpu(at::Tensor& state, const at::Tensor& config, const at::Tensor& loss,
                       const std::optional<at::Tensor>& nonfinite, const std::optional<at::Tensor>& active,
                       const std::optional<at::Tensor>& mailbox);
void governor_order_cpu(at::Tensor& state, const at::Tensor& config, int64_t column, int64_t order, int64_t reason,
                        int64_t tensor_index, const std::optional<at::Tensor>& mailbox);

// snapshot: copy live bytes to the ordered slot; copy the last known good slot back
void snapshot_capture_cpu(at::Tensor& state, int64_t column, const at::Tensor& table, int64_t part,
                          const std::optional<at::Tensor>& mailbox);
void snapshot_restore_cpu(at::Tensor& state, int64_t column, const at::Tensor& config, const at::Tensor& table,
                          const std::optional<at::Tensor>& mailbox);

}  // namespace tolaria
