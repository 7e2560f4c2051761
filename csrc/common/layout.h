// Memory layouts: operands walked flat in one memory order, and alpha as a value per run of that order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>
#include <algorithm>
#include <optional>

#include "common/fresh.h"

namespace tolaria {

// Whether two tensors of one shape place every element at the same offset (strides of size-1 dimensions say nothing).
inline bool same_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `tensor`'s values in the memory order of the dense `order`, as `type`; the tensor itself when it is that already.
inline at::Tensor in_order_of(const at::Tensor& tensor, const at::Tensor& order, at::ScalarType type) {
  if (tensor.scalar_type() == type && same_order(tensor, order)) return tensor;
  at::Tensor copy = fresh_strided(order, order.strides(), type);
  copy.copy_(tensor);
  return copy;
}

// A dense tensor in whose memory order a backward pass walks: the gradient's, or the host's where the gradient has holes
// (an expanded one, say).
inline at::Tensor gradient_order(const at::Tensor& grad, const std::optional<at::Tensor>& host) {
  if (grad.is_non_overlapping_and_dense()) return grad;
  if (host && host->is_non_overlapping_and_dense()) return *host;
  return at::empty_like(grad);
}

// Alpha over a dense tensor walked in memory order: element (o, m, i) of (outer, mid, inner) has alpha values[m].
// Scalar alpha is (1, 1, n), per sample (1, B, CHW), per channel (B, C, HW) or, channels last, (BHW, C, 1), full (1, n, 1).
struct AlphaLayout {
  int64_t outer = 1, mid = 1, inner = 1;
  at::Tensor values;                    // `mid` values, contiguous, in the arithmetic dtype
  c10::SmallVector<int64_t, 6> varied;  // the dimensions that mid runs over, in memory order

  // One alpha for a whole row of `inner` elements, rather than one for each element.
  bool is_uniform() const { return inner > 1 || mid == 1; }
};

inline AlphaLayout make_alpha_layout(const at::Tensor& alpha, const at::Tensor& order, at::ScalarType type) {
  AlphaLayout layout;
  if (alpha.numel() == 1) {
    layout.inner = order.numel();
    layout.values = alpha.scalar_type() == type ? alpha : alpha.to(type);
    return layout;
  }
  c10::SmallVector<int64_t, 6> dims;
  for (int64_t d = 0; d < order.dim(); ++d) {
    if (order.size(d) > 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return order.stride(a) > order.stride(b); });
  const int64_t missing = order.dim() - alpha.dim();
  const auto varies = [&](int64_t d) { return d >= missing && alpha.size(d - missing) > 1; };
  const auto first = std::find_if(dims.begin(), dims.end(), varies);
  const auto last = std::find_if(dims.rbegin(), dims.rend(), varies).base();
  for (auto d = dims.begin(); d != dims.end(); ++d) {
    int64_t& extent = d < first ? layout.outer : d < last ? layout.mid : layout.inner;
    extent *= order.size(*d);
  }
  const at::Tensor expanded = alpha.expand(order.sizes());
  c10::SmallVector<int64_t, 6> sizes, strides;
  for (auto d = first; d < last; ++d) {
    layout.varied.push_back(*d);
    sizes.push_back(order.size(*d));
    strides.push_back(expanded.stride(*d));
  }
  layout.values = expanded.as_strided(sizes, strides).to(type).contiguous();
  return layout;
}

// The sums over `mid` of a gradient, back in the shape and dtype of the alpha that they belong to.
inline at::Tensor sums_to_alpha(const at::Tensor& sums, const AlphaLayout& layout, const at::Tensor& order,
                                const at::Tensor& alpha) {
  if (alpha.numel() == 1) return sums.to(alpha.scalar_type()).view(alpha.sizes());
  c10::SmallVector<int64_t, 6> sizes(order.dim(), 1), strides(order.dim(), 0);
  int64_t stride = layout.mid;
  for (const int64_t d : layout.varied) {
    sizes[d] = order.size(d);
    strides[d] = stride /= order.size(d);
  }
  at::Tensor placed = sums.as_strided(sizes, strides);
  if (placed.numel() != alpha.numel()) placed = placed.to(at::kDouble);  // alpha has holes: terms are still to be added up
  return placed.sum_to_size(alpha.sizes()).to(alpha.scalar_type()).contiguous();
}

}  // namespace tolaria
