// Gradients of straight_through: the incoming one to host and seed as it is; nothing is moved unless seed's dtype differs.
#include <torch/csrc/autograd/custom_function.h>

#include "autograd/common.h"
#include "ops.h"

namespace tolaria {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_straight_through(const at::Tensor& host, const at::Tensor& seed) {
  static const auto op = find_op("tolaria::straight_through", &straight_through_autograd);
  return op.call(host, seed);
}

struct StraightThroughFunction : torch::autograd::Function<StraightThroughFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& host, const at::Tensor& seed) {
    ctx->saved_data["seed_dtype"] = static_cast<int64_t>(seed.scalar_type());
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_straight_through(host, seed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}};
    at::Tensor grad_seed;
    if (ctx->needs_input_grad(1)) {
      grad_seed = grads[0].to(static_cast<at::ScalarType>(ctx->saved_data["seed_dtype"].toInt()));
    }
    return {ctx->needs_input_grad(0) ? grads[0] : at::Tensor(), grad_seed};
  }
};

}  // namespace

at::Tensor straight_through_autograd(const at::Tensor& host, const at::Tensor& seed) {
  if (is_tracked(host) || is_tracked(seed)) return StraightThroughFunction::apply(host, seed);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_straight_through(host, seed);
}

}  // namespace tolaria
