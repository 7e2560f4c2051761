// Argument checks, shared by the CPU and CUDA wrappers; tolaria/reference/_checks.py says the same words in Python.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <array>
#include <optional>
#include <string>

namespace tolaria {

inline bool is_supported_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

// A string of its own: before torch 2.13 the names are returned by value, and a view of them would dangle.
inline std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

// A storage may have been shrunk under its tensor (untyped_storage().resize_), which torch lets one read beyond its end.
inline bool has_memory(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const auto bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                                      tensor.storage_offset());
  return tensor.has_storage() && tensor.storage().nbytes() >= bytes;
}

inline void check_memory(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(has_memory(tensor), "tolaria.", op, ": ", name, ": expected memory for its ", tensor.numel(),
                    " elements, got a storage that was resized to less");
}

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "tolaria.", op, ": ", name, ": expected a strided tensor, got ",
                   tensor.layout());
  TORCH_CHECK_TYPE(is_supported_float(tensor.scalar_type()), "tolaria.", op, ": ", name,
                   ": expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(tensor.scalar_type()));
  check_memory(op, name, tensor);
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor, const char* owner,
                              const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), "tolaria.", op, ": ", name, ": expected ", owner, "'s device ",
                    other.device(), ", got ", tensor.device(), "; move it with ", name, ".to('", other.device(), "')");
}

inline void check_same_shape(const char* op, const char* name, const at::Tensor& tensor, const char* owner,
                             const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), "tolaria.", op, ": ", name, ": expected ", owner, "'s shape ",
                    other.sizes(), ", got ", tensor.sizes());
}

inline bool broadcasts_to(at::IntArrayRef from, at::IntArrayRef to) { return at::is_expandable_to(from, to); }

inline void check_alpha(const char* op, const at::Tensor& alpha, const char* owner, const at::Tensor& other) {
  check_floating(op, "alpha", alpha);
  check_same_device(op, "alpha", alpha, owner, other);
  TORCH_CHECK_VALUE(broadcasts_to(alpha.sizes(), other.sizes()), "tolaria.", op,
                    ": alpha: expected a shape that broadcasts to ", owner, "'s ", other.sizes(), ", got ",
                    alpha.sizes());
}

inline void check_pair(const char* op, const at::Tensor& host, const at::Tensor& seed) {
  check_floating(op, "host", host);
  check_floating(op, "seed", seed);
  check_same_device(op, "seed", seed, "host", host);
  check_same_shape(op, "seed", seed, "host", host);
}

inline void check_blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                 const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                 at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  const char* op = "blend_backward";
  check_floating(op, "grad", grad);
  check_alpha(op, alpha, "grad", grad);
  TORCH_CHECK_TYPE(is_supported_float(seed_dtype), "tolaria.", op,
                   ": seed_dtype: expected float32, float64, float16 or bfloat16, got ", dtype_name(seed_dtype));
  if (!output_mask[2]) return;
  TORCH_CHECK_VALUE(host && seed, "tolaria.", op, ": host and seed: expected tensors, since grad_alpha is asked for");
  check_pair(op, *host, *seed);
  check_same_shape(op, "grad", grad, "host", *host);
  check_same_device(op, "grad", grad, "host", *host);
  TORCH_CHECK_TYPE(host->scalar_type() == grad.scalar_type() && seed->scalar_type() == seed_dtype, "tolaria.", op,
                   ": expected grad in host's dtype and seed in seed_dtype, got grad ", dtype_name(grad.scalar_type()),
                   ", host ", dtype_name(host->scalar_type()), ", seed ", dtype_name(seed->scalar_type()),
                   ", seed_dtype ", dtype_name(seed_dtype));
}

}  // namespace tolaria
