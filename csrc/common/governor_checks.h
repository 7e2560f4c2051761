// Argument checks of the governor and snapshot ops, shared by the CPU and the CUDA side.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "math/governor.h"
#include "math/stats.h"

namespace tolaria {

// Whether the storage ends behind so many elements; without a walk over the strides, which a step cannot afford.
inline void check_span(const char* name, const at::Tensor& tensor, int64_t elements) {
  const size_t held = tensor.unsafeGetTensorImpl()->unsafe_storage().nbytes();
  TORCH_CHECK_VALUE(elements == 0 || held >= (tensor.storage_offset() + elements) * tensor.itemsize(), name,
                    ": expected memory for its ", tensor.numel(), " elements, got a storage that was resized to less");
}

inline int governor_window(const at::Tensor& state) {
  TORCH_CHECK_VALUE(state.scalar_type() == at::kDouble && state.dim() == 2 &&
                        (state.stride(1) == 1 || state.size(1) == 1) && state.stride(0) >= state.size(1),
                    "state: expected a float64 matrix (fields, governors) whose rows are contiguous, got ",
                    dtype_name(state.scalar_type()), " of shape ", state.sizes(), " and strides ", state.strides());
  const int64_t memories = state.size(0) - math::field::count;
  const int64_t windows = memories / 3 - math::memory::count, window = windows / 2;
  TORCH_CHECK_VALUE(memories % 3 == 0 && windows % 2 == 0 && window >= 1 && window <= math::kMaxWindow,
                    "state: ", state.size(0), " fields fit no window length; make it with tolaria.ops.governor_state");
  check_span("state", state, state.size(1) == 0 ? 0 : (state.size(0) - 1) * state.stride(0) + state.size(1));
  return static_cast<int>(window);
}

inline void check_governor_config(const at::Tensor& state, const at::Tensor& config) {
  TORCH_CHECK_VALUE(config.scalar_type() == at::kDouble && config.dim() == 1 && config.is_contiguous() &&
                        config.numel() == math::config::count,
                    "config: expected ", int(math::config::count), " float64 values, got ",
                    dtype_name(config.scalar_type()), " of shape ", config.sizes());
  TORCH_CHECK_VALUE(config.device() == state.device(), "config: expected on ", state.device(), " like state, got ",
                    config.device());
  check_span("config", config, config.numel());
}

inline int64_t check_mailbox(const at::Tensor& state, const std::optional<at::Tensor>& mailbox) {
  if (!mailbox.has_value()) return 0;
  TORCH_CHECK_VALUE(mailbox->scalar_type() == at::kDouble && mailbox->dim() == 2 && mailbox->is_contiguous() &&
                        mailbox->size(0) == state.size(1) && mailbox->size(1) >= math::status::count &&
                        (mailbox->size(1) - math::status::count) % math::record::count == 0,
                    "mailbox: expected a contiguous float64 matrix (governors, ", int(math::status::count), " + k * ",
                    int(math::record::count), ") for ", state.size(1), " governors, got ",
                    dtype_name(mailbox->scalar_type()), " of shape ", mailbox->sizes());
  TORCH_CHECK_VALUE(mailbox->is_cpu() && (state.is_cpu() || mailbox->is_pinned()),
                    "mailbox: expected in ", state.is_cpu() ? "CPU memory" : "page-locked CPU memory", ", got on ",
                    mailbox->device());
  check_span("mailbox", *mailbox, mailbox->numel());
  return (mailbox->size(1) - math::status::count) / math::record::count;
}

// What to do with a loss for each sample, or a flag, where one governor judges one number.
inline std::string several_values_hint(const at::Tensor& state, const at::Tensor& values, const char* name) {
  const std::string_view argument = name;
  if (state.size(1) != 1 || values.numel() < 2 || argument == "gradient") return "";
  return std::string("; pass ") + name + (argument == "loss" ? ".mean()" : ".any()");
}

inline at::Tensor contiguous_values(const at::Tensor& values, const char* name) {
  if (values.is_contiguous()) {
    check_span(name, values, values.numel());
    return values;
  }
  TORCH_CHECK_VALUE(has_memory(values), name, ": expected memory for its ", values.numel(),
                    " elements, got a storage that was resized to less");
  return values.contiguous();
}

// A per-governor argument: one value for each governor, on state's device. Returned contiguous.
inline at::Tensor check_per_governor(const at::Tensor& state, const at::Tensor& values, const char* name) {
  TORCH_CHECK_VALUE(values.numel() == state.size(1), name, ": expected one value for each of the ", state.size(1),
                    " governors, got shape ", values.sizes(), several_values_hint(state, values, name));
  TORCH_CHECK_VALUE(values.device() == state.device(), name, ": expected on ", state.device(), " like state, got ",
                    values.device());
  return contiguous_values(values, name);
}

inline at::Tensor check_loss(const at::Tensor& state, const at::Tensor& loss) {
  TORCH_CHECK_TYPE(at::isFloatingType(loss.scalar_type()) && loss.element_size() >= 2,
                   "loss: expected float64, float32, float16 or bfloat16, got ", dtype_name(loss.scalar_type()));
  return check_per_governor(state, loss, "loss");
}

inline std::optional<at::Tensor> check_flag(const at::Tensor& state, const std::optional<at::Tensor>& flag,
                                            const char* name) {
  if (!flag.has_value()) return std::nullopt;
  const auto dtype = flag->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kBool || (at::isFloatingType(dtype) && flag->element_size() >= 2), name,
                   ": expected bool (or a floating found_inf), got ", dtype_name(dtype));
  return check_per_governor(state, *flag, name);
}

// Either a norm for each governor, or a row of tensor_stats for each.
inline std::optional<at::Tensor> check_gradient(const at::Tensor& state, const std::optional<at::Tensor>& gradient) {
  if (!gradient.has_value()) return std::nullopt;
  TORCH_CHECK_TYPE(at::isFloatingType(gradient->scalar_type()) && gradient->element_size() >= 2,
                   "gradient: expected float64, float32, float16 or bfloat16, got ",
                   dtype_name(gradient->scalar_type()));
  if (gradient->scalar_type() != at::kDouble || gradient->numel() != state.size(1) * math::kStatsFields) {
    return check_per_governor(state, *gradient, "gradient");
  }
  TORCH_CHECK_VALUE(gradient->device() == state.device(), "gradient: expected on ", state.device(),
                    " like state, got ", gradient->device());
  return contiguous_values(*gradient, "gradient");
}

inline void check_column(const at::Tensor& state, int64_t column) {
  TORCH_CHECK_VALUE(column >= 0 && column < state.size(1), "column: expected 0 to ", state.size(1) - 1, ", got ",
                    column);
}

inline void check_order(int64_t order, int64_t reason) {
  TORCH_CHECK_VALUE(order >= 0 && order < math::kOrders, "order: expected 0 to ", math::kOrders - 1, ", got ", order);
  TORCH_CHECK_VALUE(reason >= 0 && reason < math::kReasons, "reason: expected 0 to ", math::kReasons - 1, ", got ",
                    reason);
}

// Element i of a tensor of any dtype that the checks above let through, as float64.
C10_HOST_DEVICE inline double load_as_double(const void* data, at::ScalarType dtype, int64_t i) {
  switch (dtype) {
    case at::kDouble: return static_cast<const double*>(data)[i];
    case at::kFloat: return static_cast<const float*>(data)[i];
    case at::kHalf: return static_cast<float>(static_cast<const at::Half*>(data)[i]);
    case at::kBFloat16: return static_cast<float>(static_cast<const at::BFloat16*>(data)[i]);
    default: return static_cast<const uint8_t*>(data)[i] != 0 ? 1.0 : 0.0;  // a bool of any byte
  }
}

}  // namespace tolaria
