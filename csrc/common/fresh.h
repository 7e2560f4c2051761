// Memory of outputs. A large one on the CPU comes from a pool of what earlier outputs gave back, since fresh memory is the
// dearest kind: the C library returns blocks of megabytes to the system when they are freed, and the system zeroes every
// page of the next one at its first touch. csrc/cpu/output_pool.cpp has the figures.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/Allocator.h>
#include <cstdint>
#include <cstdlib>

namespace tolaria {

// Smaller outputs stay with torch's allocator: the C library keeps what they free.
constexpr int64_t kPooledBytes = 1 << 20;

#ifdef TOLARIA_SANITIZE
// Reuse hides what is read too late: under the sanitizers (build_tools/sanitize.py) the pool serves its own tests alone.
inline bool uses_pool() {
  static const bool is_wanted = std::getenv("TOLARIA_SANITIZE_POOL") != nullptr;
  return is_wanted;
}
#else
constexpr bool uses_pool() { return true; }
#endif

// The pool, as an allocator that torch can resize a tensor with. It lives until the process ends.
c10::Allocator* output_pool();

// Whether this memory is the pool's.
bool is_pooled(const c10::DataPtr& memory);

// A tensor of these sizes and strides in the memory of `model`'s device, not yet written.
inline at::Tensor fresh_strided(const at::Tensor& model, at::IntArrayRef strides, at::ScalarType type) {
  if (!model.is_cpu()) return at::empty_strided(model.sizes(), strides, model.options().dtype(type));
  const auto bytes = at::detail::computeStorageNbytes(model.sizes(), strides, c10::elementSize(type));
  if (static_cast<int64_t>(bytes) < kPooledBytes || !uses_pool()) {
    return at::detail::empty_strided_cpu(model.sizes(), strides, type);  // through the dispatcher: 3,600 instructions
  }
  return at::detail::empty_strided_generic(model.sizes(), strides, output_pool(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), type);
}

// An output in the shape and memory order of `model`, not yet written.
inline at::Tensor fresh_like(const at::Tensor& model, at::ScalarType type) {
  if (!model.is_cpu()) return at::empty_like(model, model.options().dtype(type));
  if (model.is_non_overlapping_and_dense()) return fresh_strided(model, model.strides(), type);
  return fresh_strided(model, at::infer_dense_strides(model.sizes(), model.strides()), type);  // as empty_like does
}

inline at::Tensor fresh_like(const at::Tensor& model) { return fresh_like(model, model.scalar_type()); }

}  // namespace tolaria
