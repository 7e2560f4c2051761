// The table of contents: every schema of the namespace `tolaria`, and which function serves it on which dispatch key.
#include <torch/library.h>

#include <utility>
#include <vector>

#include "ops.h"

namespace {

// Negated views (a bit of the tensor): torch's fallback takes it that an op which changes one returns it, and reads past
// the stack of an op that returns nothing. Here such an op gets copies, and what it changed in them is written back.
void resolve_negated(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<std::pair<at::Tensor, at::Tensor>> changed;  // a view and its copy
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_neg()) continue;
    const at::Tensor view = value.toTensor(), copy = view.resolve_neg();
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) changed.emplace_back(view, copy);
    value = copy;
  }
  constexpr auto behind = c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative);
  op.redispatchBoxed(keys & behind, stack);
  for (auto& [view, copy] : changed) view.copy_(copy);
}

}  // namespace

TORCH_LIBRARY(tolaria, m) {
  m.set_python_module("tolaria.ops._fake");  // a missing fake then names the module to import

  m.def("release_idle_outputs() -> int", &tolaria::release_idle_outputs);
#ifdef TOLARIA_WITH_CUDA
  m.def("page_locked(int nbytes) -> Tensor", &tolaria::page_locked);
#endif

  m.def("blend(Tensor host, Tensor seed, Tensor alpha) -> Tensor");
  m.def(
      "blend_backward(Tensor grad, Tensor? host, Tensor? seed, Tensor alpha, ScalarType seed_dtype, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "blend_backward_(Tensor(a!) grad, Tensor? host, Tensor? seed, Tensor alpha, ScalarType seed_dtype, "
      "bool[2] output_mask) -> (Tensor, Tensor)");
  m.def("seed_gate(Tensor features, Tensor alpha) -> Tensor");
  m.def("seed_gate_backward(Tensor grad, Tensor alpha) -> Tensor");
  m.def("seed_gate_backward_(Tensor(a!) grad, Tensor alpha) -> ()");
  m.def("straight_through(Tensor host, Tensor seed) -> Tensor");
  m.def("tensor_stats(Tensor?[] tensors) -> Tensor");
  m.def("metrics_fields() -> str[]", &tolaria::metrics_fields);
  m.def(
      "classification_metrics_(Tensor(a!) acc, Tensor logits, Tensor labels, int ignore_index=-100, int topk=5) "
      "-> ()");

  m.def("governor_fields() -> str[]", &tolaria::governor_fields);
  m.def(
      "governor_step_(Tensor(a!) state, Tensor config, Tensor loss, Tensor? nonfinite=None, Tensor? active=None, "
      "Tensor(b!)? mailbox=None, Tensor? gradient=None, Tensor? state_bad=None) -> ()");
  m.def(
      "governor_order_(Tensor(a!) state, Tensor config, int column, int order, int reason, int tensor_index, "
      "Tensor(b!)? mailbox=None) -> ()");
  m.def(
      "snapshot_capture_(Tensor(a!) state, int column, Tensor table, int part, Tensor(b!)? mailbox=None, int ticket=0, "
      "bool aside=False) -> ()");
  m.def(
      "snapshot_restore_(Tensor(a!) state, int column, Tensor config, Tensor table, Tensor(b!)? mailbox=None) -> ()");
}

TORCH_LIBRARY_IMPL(tolaria, Negative, m) {
  for (const char* op : {"governor_step_", "governor_order_", "snapshot_capture_", "snapshot_restore_",
                         "seed_gate_backward_", "blend_backward_", "classification_metrics_"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&resolve_negated>());
  }
}

TORCH_LIBRARY_IMPL(tolaria, CPU, m) {
  m.impl("governor_step_", &tolaria::governor_step_cpu);
  m.impl("governor_order_", &tolaria::governor_order_cpu);
  m.impl("snapshot_capture_", &tolaria::snapshot_capture_cpu);
  m.impl("snapshot_restore_", &tolaria::snapshot_restore_cpu);

  m.impl("blend", &tolaria::blend_cpu);
  m.impl("blend_backward", &tolaria::blend_backward_cpu);
  m.impl("blend_backward_", &tolaria::blend_backward_inplace_cpu);
  m.impl("seed_gate", &tolaria::seed_gate_cpu);
  m.impl("seed_gate_backward", &tolaria::seed_gate_backward_cpu);
  m.impl("seed_gate_backward_", &tolaria::seed_gate_backward_inplace_cpu);
  m.impl("straight_through", &tolaria::straight_through_cpu);
  m.impl("tensor_stats", &tolaria::tensor_stats_cpu);
  m.impl("classification_metrics_", &tolaria::classification_metrics_cpu);
}

TORCH_LIBRARY_IMPL(tolaria, Autograd, m) {
  m.impl("blend", &tolaria::blend_autograd);
  m.impl("blend_backward", &tolaria::blend_backward_autograd);
  m.impl("seed_gate", &tolaria::seed_gate_autograd);
  m.impl("seed_gate_backward", &tolaria::seed_gate_backward_autograd);
  m.impl("straight_through", &tolaria::straight_through_autograd);
  m.impl("tensor_stats", &tolaria::tensor_stats_autograd);
  m.impl("classification_metrics_", &tolaria::classification_metrics_autograd);

  // Nothing to differentiate; without a word here torch would box every argument to find that out.
  for (const char* op : {"governor_step_", "governor_order_", "snapshot_capture_", "snapshot_restore_"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

#ifdef TOLARIA_WITH_CUDA
TORCH_LIBRARY_IMPL(tolaria, CUDA, m) {
  m.impl("blend", &tolaria::blend_cuda);
  m.impl("blend_backward", &tolaria::blend_backward_cuda);
  m.impl("blend_backward_", &tolaria::blend_backward_inplace_copied);
  m.impl("seed_gate", &tolaria::seed_gate_cuda);
  m.impl("seed_gate_backward", &tolaria::seed_gate_backward_cuda);
  m.impl("seed_gate_backward_", &tolaria::seed_gate_backward_inplace_copied);
  m.impl("straight_through", &tolaria::straight_through_cuda);
  m.impl("tensor_stats", &tolaria::tensor_stats_cuda);
  m.impl("classification_metrics_", &tolaria::classification_metrics_cuda);
}
#endif

// Layouts that no op takes get the same words as everything else, rather than torch's "no kernel for this backend".
TORCH_LIBRARY_IMPL(tolaria, SparseCPU, m) { m.impl("tensor_stats", &tolaria::tensor_stats_refuse); }
TORCH_LIBRARY_IMPL(tolaria, SparseCUDA, m) { m.impl("tensor_stats", &tolaria::tensor_stats_refuse); }
TORCH_LIBRARY_IMPL(tolaria, SparseCsrCPU, m) { m.impl("tensor_stats", &tolaria::tensor_stats_refuse); }
TORCH_LIBRARY_IMPL(tolaria, SparseCsrCUDA, m) { m.impl("tensor_stats", &tolaria::tensor_stats_refuse); }
TORCH_LIBRARY_IMPL(tolaria, QuantizedCPU, m) { m.impl("tensor_stats", &tolaria::tensor_stats_refuse); }

#ifdef TOLARIA_WITH_CUDA
TORCH_LIBRARY_IMPL(tolaria, CUDA, m) {
  m.impl("governor_step_", &tolaria::governor_step_cuda);
  m.impl("governor_order_", &tolaria::governor_order_cuda);
  m.impl("snapshot_capture_", &tolaria::snapshot_capture_cuda);
  m.impl("snapshot_restore_", &tolaria::snapshot_restore_cuda);
}
#endif
