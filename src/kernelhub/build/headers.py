"""The header files that the builder gives to a kernel's sources."""

from __future__ import annotations

# What bindings include. The names are those of the `kernels` project's builder.
REGISTRATION = """#pragma once

// Made by kernelhub: macros that register ops and the Python module of a build, whose name is itself a macro.
// Each passes its arguments on once more, so that TORCH_EXTENSION_NAME is replaced by its value first.

#include <Python.h>

#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)
#define TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)

#define KERNELHUB_JOIN_(A, B) A##B
#define KERNELHUB_JOIN(A, B) KERNELHUB_JOIN_(A, B)
#define KERNELHUB_TEXT_(A) #A
#define KERNELHUB_TEXT(A) KERNELHUB_TEXT_(A)

// An empty Python module: importing it loads the library, and loading registers the ops.
#define REGISTER_EXTENSION(NAME)                                                              \\
  PyMODINIT_FUNC KERNELHUB_JOIN(PyInit_, NAME)(void) {                                        \\
    static PyModuleDef_Slot slots[] = {{0, nullptr}};                                         \\
    static PyModuleDef definition = {                                                         \\
        PyModuleDef_HEAD_INIT, KERNELHUB_TEXT(NAME), nullptr, 0, nullptr, slots, nullptr,     \\
        nullptr, nullptr};                                                                    \\
    return PyModuleDef_Init(&definition);                                                     \\
  }
"""

# Included before everything else where the C++ library is linked into the kernel.
PORTABLE = """#pragma once

// Made by kernelhub. This library brings its own C++ runtime: an exception that left it for torch's frames, which know
// another one, would end the process. So each boxed op catches, and what was thrown is thrown again by torch itself,
// from a frame that has nothing to destroy.

#include <cstring>
#include <exception>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

namespace kernelhub_portable {

struct Message {
  char text[2048];
};

// Not inlined: the frame that torch's exception passes must have no handlers, or torch's runtime asks ours what they are.
template <typename FuncT, FuncT* func>
[[gnu::noinline]] bool run(StableIValue* stack, uint64_t inputs, uint64_t outputs, Message& message) noexcept {
  const char* what = "the kernel threw what is no std::exception";
  try {
    torch::stable::detail::boxer<FuncT, func>::boxed_fn(stack, inputs, outputs);
    return true;
  } catch (const std::exception& error) {
    std::strncpy(message.text, error.what(), sizeof(message.text) - 1);
  } catch (...) {
    std::strncpy(message.text, what, sizeof(message.text) - 1);
  }
  message.text[sizeof(message.text) - 1] = 0;
  return false;
}

template <typename FuncT, FuncT* func>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  Message message;
  if (!run<FuncT, func>(stack, inputs, outputs, message)) {
    aoti_torch_check(false, "", "", 0, message.text);
  }
}

} // namespace kernelhub_portable

#undef TORCH_BOX
#define TORCH_BOX(func) \\
  (&kernelhub_portable::boxed<std::remove_pointer_t<std::remove_reference_t<decltype(func)>>, (func)>)
"""

# torch's CPU builds ship the CUDA headers without this one, which says how torch's own CUDA library was made.
CUDA_CMAKE_MACROS = """#pragma once

// Made by kernelhub: torch here was built without CUDA and lacks this file.

#define C10_CUDA_BUILD_SHARED_LIBS
"""
