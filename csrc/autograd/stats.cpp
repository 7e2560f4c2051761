// tensor_stats has no gradient: tensors that require one are read as they are.
#include "autograd/common.h"
#include "ops.h"

namespace tolaria {

at::Tensor tensor_stats_autograd(const c10::List<std::optional<at::Tensor>>& tensors) {
  static const auto op = find_op("tolaria::tensor_stats", &tensor_stats_autograd);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(tensors);
}

}  // namespace tolaria
