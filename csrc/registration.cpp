// The table of contents: every schema of the namespace `tolaria`, and which function serves it on which dispatch key.
#include <Python.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(tolaria, m) {
  m.set_python_module("tolaria.ops._fake");  // a missing fake then names the module to import

}

// `import tolaria._C` only runs the static registrations above; there is nothing in the module itself.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
