// Argument checks of classification_metrics_, shared by both devices, and its rows: the positions that have a label.
#pragma once

#include <ATen/core/Tensor.h>
#include <vector>

#include "common/checks.h"
#include "math/metrics.h"

namespace tolaria {

inline void check_metrics(const at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels, int64_t topk) {
  const char* op = "classification_metrics_";
  check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() >= 1, "tolaria.", op,
                    ": logits: expected shape (N, C), (N, C, d1, ...) or (C,), got a 0-dim tensor");
  const int64_t class_dim = logits.dim() == 1 ? 0 : 1, classes = logits.size(class_dim);
  TORCH_CHECK_TYPE(c10::isIntegralType(labels.scalar_type(), /*includeBool=*/false) && labels.layout() == at::kStrided,
                   "tolaria.", op, ": labels: expected integers (class indices), got ",
                   dtype_name(labels.scalar_type()));
  std::vector<int64_t> expected = logits.sizes().vec();
  expected.erase(expected.begin() + class_dim);
  TORCH_CHECK_VALUE(labels.sizes() == at::IntArrayRef(expected), "tolaria.", op, ": labels: expected shape ",
                    at::IntArrayRef(expected), " for logits of shape ", logits.sizes(),
                    " (classes along dimension ", class_dim, "), got ", labels.sizes());
  check_same_device(op, "labels", labels, "logits", logits);
  check_memory(op, "labels", labels);
  TORCH_CHECK_TYPE(acc.scalar_type() == at::kDouble, "tolaria.", op, ": acc: expected dtype float64, got ",
                   dtype_name(acc.scalar_type()));
  const int64_t fields = math::kMetricsFields;
  TORCH_CHECK_VALUE(acc.dim() == 1 && acc.is_contiguous() && (acc.size(0) == fields || acc.size(0) == fields + 2 * classes),
                    "tolaria.", op, ": acc: expected a contiguous vector of ", fields, " or, with per-class counts, ",
                    fields + 2 * classes, " values for ", classes, " classes, got shape ", acc.sizes());
  check_same_device(op, "acc", acc, "logits", logits);
  check_memory(op, "acc", acc);
  TORCH_CHECK_VALUE(topk >= 1, "tolaria.", op, ": topk: expected at least 1, got ", topk);
}

// Logits as rows of classes: row r = (r / inner, r % inner) starts at those strides; classes lie `stride` apart.
struct LogitRows {
  int64_t rows, classes, inner, outer_step, inner_step, stride;

  C10_HOST_DEVICE int64_t offset(int64_t row) const { return (row / inner) * outer_step + (row % inner) * inner_step; }
};

// `logits` brought to a form that LogitRows describes (a copy only if its trailing dimensions do not lie evenly).
inline at::Tensor as_rows(const at::Tensor& logits) {
  if (logits.dim() == 1) return logits.view({1, logits.size(0), 1});
  if (logits.dim() == 2) return logits.unsqueeze(2);
  if (logits.dim() == 3) return logits;
  const auto step = [&](int64_t d) { return logits.stride(d) == logits.stride(d + 1) * logits.size(d + 1); };
  bool is_even = true;
  for (int64_t d = 2; d + 1 < logits.dim(); ++d) is_even = is_even && step(d);
  return is_even ? logits.flatten(2) : logits.contiguous().flatten(2);
}

inline LogitRows logit_rows(const at::Tensor& logits) {
  return {logits.size(0) * logits.size(2), logits.size(1),   logits.size(2),
          logits.stride(0),                logits.stride(2), logits.stride(1)};
}

}  // namespace tolaria
