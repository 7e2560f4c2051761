// classification_metrics_ has no gradient; what it writes is marked as changed, as for any in-place op.
#include <torch/csrc/autograd/variable.h>

#include "autograd/common.h"
#include "ops.h"

namespace tolaria {

void classification_metrics_autograd(at::Tensor& acc, const at::Tensor& logits, const at::Tensor& labels,
                                     int64_t ignore_index, int64_t topk) {
  static const auto op = find_op("tolaria::classification_metrics_", &classification_metrics_autograd);
  TORCH_CHECK_VALUE(!acc.requires_grad(), "tolaria.classification_metrics_: acc: expected a tensor that does not ",
                    "require grad; create it with torch.zeros or detach it");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(acc, logits, labels, ignore_index, topk);
  }
  if (!acc.is_inference()) torch::autograd::impl::bump_version(acc);
}

}  // namespace tolaria
