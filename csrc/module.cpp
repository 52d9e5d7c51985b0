// fastgan._C: what every native kernel shares: the build record, the call counter, the instruction-set choice, and the
// module that `import fastgan._C` finds. Kernels register themselves from their own files (csrc/cpu/<op>.cpp).
#include <Python.h>

#include "common.h"
#include "fastgan_build.h"

// fastgan/backends.py finds this text in the file before it loads it: a stale build must not get to register kernels.
extern "C" __attribute__((used, visibility("default"))) const char fastgan_build_record[] =
    "FASTGAN_BUILD{" FASTGAN_BUILD_RECORD "}";

namespace fastgan {

std::atomic<int64_t> calls{0};

namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

const Isa best = detect();
std::atomic<Isa> chosen{best};
const char* const names[] = {"baseline", "avx2", "avx512"};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace fastgan

namespace {

using fastgan::Isa;

PyObject* py_calls(PyObject*, PyObject*) { return PyLong_FromLongLong(fastgan::calls.load()); }

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastgan::names[int(fastgan::isa())]); }

PyObject* py_set_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string wanted = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  for (int level = 0; level <= int(fastgan::best); ++level)
    if (wanted == fastgan::names[level]) {
      fastgan::chosen.store(Isa(level));
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "isa: %U is none of the levels this processor runs, the highest being %s", name,
                      fastgan::names[int(fastgan::best)]);
}

PyMethodDef methods[] = {
    {"calls", py_calls, METH_NOARGS, "How many native kernels have run in this process."},
    {"isa", py_isa, METH_NOARGS, "The instruction set that CPU kernels use: baseline, avx2 or avx512."},
    {"set_isa", py_set_isa, METH_O, "Use this instruction set from now on, at most the processor's best."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastgan._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
