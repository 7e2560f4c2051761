// Argument checks of tensor_stats, shared by both devices.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include "common/checks.h"

namespace tolaria {

using OptionalTensorList = c10::List<std::optional<at::Tensor>>;

inline bool is_countable(at::ScalarType type) {
  return is_supported_float(type) || c10::isIntegralType(type, /*includeBool=*/true);
}

// Calls body(index, tensor) for each tensor of the list after checking it; all must share the first one's device.
template <class Body>
void for_each_checked(const OptionalTensorList& tensors, const Body& body) {
  at::Tensor first;
  int64_t first_index = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const std::optional<at::Tensor> tensor = tensors.get(i);
    if (!tensor || !tensor->defined()) continue;
    TORCH_CHECK_TYPE(tensor->layout() == at::kStrided, "tolaria.tensor_stats: tensors[", i,
                     "]: expected a strided tensor, got ", tensor->layout());
    TORCH_CHECK_TYPE(is_countable(tensor->scalar_type()), "tolaria.tensor_stats: tensors[", i,
                     "]: expected dtype float32, float64, float16, bfloat16, an integer or bool, got ",
                     dtype_name(tensor->scalar_type()));
    if (!first.defined()) {
      first = *tensor;
      first_index = i;
    }
    TORCH_CHECK_VALUE(tensor->device() == first.device(), "tolaria.tensor_stats: tensors[", i, "]: expected tensors[",
                      first_index, "]'s device ", first.device(), ", got ", tensor->device(),
                      "; call it once for each device");
    if (tensor->_is_zerotensor()) continue;  // zeros without memory; torch makes them real in lists of tensors, not here
    TORCH_CHECK_VALUE(has_memory(*tensor), "tolaria.tensor_stats: tensors[", i, "]: expected memory for its ",
                      tensor->numel(), " elements, got a storage that was resized to less");
    body(i, *tensor);
  }
}

}  // namespace tolaria
