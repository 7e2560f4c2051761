// The governor ops' arguments, checked and turned into plain structs that both the CPU loop and the CUDA kernel take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/governor_checks.h"
#include "math/governor.h"
#include "math/stats.h"

namespace tolaria {

// n governors side by side, with their rows of the mailbox.
struct GovernorBatch {
  double* state;
  int64_t n;
  int64_t stride;  // from field to field; at least n
  int window;
  double* mailbox;
  int64_t mailbox_row;
  int64_t ring_records;

  C10_HOST_DEVICE math::Governor operator[](int64_t i) const {
    return {state + i, stride, window, mailbox == nullptr ? nullptr : mailbox + i * mailbox_row, ring_records};
  }
};

inline GovernorBatch governor_batch(at::Tensor& state, const std::optional<at::Tensor>& mailbox) {
  const int window = governor_window(state);
  const int64_t records = check_mailbox(state, mailbox);
  const int64_t row = mailbox.has_value() ? mailbox->size(1) : 0;
  return {state.mutable_data_ptr<double>(), state.size(1), state.stride(0), window,
          mailbox.has_value() ? mailbox->mutable_data_ptr<double>() : nullptr, row, records};
}

inline math::Governor governor_at(at::Tensor& state, int64_t column, const std::optional<at::Tensor>& mailbox) {
  check_column(state, column);
  return governor_batch(state, mailbox)[column];
}

// What is judged: a loss for each governor, three optional flags, and the gradient's norm where that is known.
struct GovernorLosses {
  const void* loss;
  at::ScalarType loss_dtype;
  const void* nonfinite;
  at::ScalarType nonfinite_dtype;
  const void* active;
  at::ScalarType active_dtype;
  const void* gradient;
  at::ScalarType gradient_dtype;
  bool gradient_is_stats;  // rows of tensor_stats instead of norms
  const void* state_bad;
  at::ScalarType state_bad_dtype;

  C10_HOST_DEVICE math::Sample<math::Governor> operator[](int64_t i) const {
    return {load_as_double(loss, loss_dtype, i), is_raised(nonfinite, nonfinite_dtype, i), gradient != nullptr,
            gradient_norm(i), is_raised(state_bad, state_bad_dtype, i)};
  }
  C10_HOST_DEVICE bool is_active(int64_t i) const {
    return active == nullptr || load_as_double(active, active_dtype, i) != 0.0;
  }

 private:
  // A NaN flag counts as raised.
  static C10_HOST_DEVICE bool is_raised(const void* flag, at::ScalarType dtype, int64_t i) {
    return flag != nullptr && !(load_as_double(flag, dtype, i) == 0.0);
  }
  C10_HOST_DEVICE double gradient_norm(int64_t i) const {
    if (gradient == nullptr) return 0.0;
    if (!gradient_is_stats) return load_as_double(gradient, gradient_dtype, i);
    return math::norm_of(static_cast<const double*>(gradient) + i * math::kStatsFields);
  }
};

// Keeps alive what `losses` points to (an argument that was not contiguous was copied).
struct GovernorArguments {
  GovernorArguments(const at::Tensor& state, const at::Tensor& loss, const std::optional<at::Tensor>& nonfinite,
                    const std::optional<at::Tensor>& active, const std::optional<at::Tensor>& gradient,
                    const std::optional<at::Tensor>& state_bad)
      : loss_(check_loss(state, loss)),
        nonfinite_(check_flag(state, nonfinite, "nonfinite")),
        active_(check_flag(state, active, "active")),
        gradient_(check_gradient(state, gradient)),
        state_bad_(check_flag(state, state_bad, "state_bad")),
        losses{loss_.const_data_ptr(),
               loss_.scalar_type(),
               nonfinite_ ? nonfinite_->const_data_ptr() : nullptr,
               nonfinite_ ? nonfinite_->scalar_type() : at::kBool,
               active_ ? active_->const_data_ptr() : nullptr,
               active_ ? active_->scalar_type() : at::kBool,
               gradient_ ? gradient_->const_data_ptr() : nullptr,
               gradient_ ? gradient_->scalar_type() : at::kDouble,
               gradient_ && gradient_->numel() != state.size(1),
               state_bad_ ? state_bad_->const_data_ptr() : nullptr,
               state_bad_ ? state_bad_->scalar_type() : at::kBool} {}

 private:
  at::Tensor loss_;
  std::optional<at::Tensor> nonfinite_, active_, gradient_, state_bad_;

 public:
  GovernorLosses losses;
};

}  // namespace tolaria
