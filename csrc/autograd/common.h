// What the autograd wrappers share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

namespace tolaria {

// Whether autograd has anything to do with this tensor: reverse mode, or a forward-mode tangent.
inline bool is_tracked(const at::Tensor& tensor) {
  return tensor.defined() && ((at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(0).defined());
}

inline bool is_tracked(const std::optional<at::Tensor>& tensor) { return tensor && is_tracked(*tensor); }

// A typed handle of an op: TOLARIA_OP(blend_autograd, "blend") has the signature of the named function.
template <class Function>
auto find_op(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace tolaria
