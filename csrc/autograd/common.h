// What the autograd wrappers share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/CPUAllocator.h>

#include "common/fresh.h"

namespace tolaria {

// Whether autograd has anything to do with this tensor: reverse mode, or a forward-mode tangent.
inline bool is_tracked(const at::Tensor& tensor) {
  return tensor.defined() && ((at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(0).defined());
}

inline bool is_tracked(const std::optional<at::Tensor>& tensor) { return tensor && is_tracked(*tensor); }

// Whether a backward may write over the CPU gradient that it was handed, since nobody can look at that memory any more: no
// tensor, view, hook, Python object or lazy copy but the one reference here, and memory of torch's own allocator or of our
// pool (a NumPy array may still look at what came from it). torch's engine judges alike before it adds gradients up in
// place. Not under anything that traces, wraps or differentiates what runs here.
inline bool is_ours_alone(const at::Tensor& grad) {
  if (at::GradMode::is_enabled() || !grad.is_cpu() || at::isTensorSubclassLike(grad)) return false;
  if (grad.use_count() != 1 || grad.weak_use_count() != 1 || !grad.has_storage() || !grad.is_non_overlapping_and_dense()) {
    return false;
  }
  if (grad.requires_grad() || grad._fw_grad(0).defined() || grad.is_neg() || grad.is_inference()) return false;
  const at::Storage& storage = grad.storage();
  const c10::DataPtr& memory = storage.data_ptr();
  return storage.use_count() == 1 && storage.nbytes() == grad.nbytes() &&
         (memory.get_deleter() == c10::GetCPUAllocator()->raw_deleter() || is_pooled(memory));
}

// A typed handle of an op: TOLARIA_OP(blend_autograd, "blend") has the signature of the named function.
template <class Function>
auto find_op(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace tolaria
