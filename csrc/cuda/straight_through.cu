// straight_through on CUDA: the host's bits in fresh memory, by torch's own copy.
#include <ATen/ops/empty_like.h>

#include "common/checks.h"
#include "ops.h"

namespace tolaria {

at::Tensor straight_through_cuda(const at::Tensor& host, const at::Tensor& seed) {
  check_pair("straight_through", host, seed);
  return at::empty_like(host).copy_(host);
}

}  // namespace tolaria
