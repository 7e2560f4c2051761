// The C++ prototypes behind the schemas of registration.cpp, one block per op; suffix _cpu, _cuda or _autograd.
#pragma once

#include <ATen/core/Tensor.h>

namespace tolaria {

}  // namespace tolaria
