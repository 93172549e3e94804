// sparsekern._C: direct calls, and what the doctor tells beyond the operators. Nothing needs it, and it links no torch.
#include <pybind11/pybind11.h>

#include <string>

namespace sparsekern {
int add_direct_calls(PyObject* module);
}

namespace py = pybind11;

namespace {

#if defined(__clang__)
const char kCompiler[] = "clang " __clang_version__;
#else
const char kCompiler[] = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["instruction_sets"] = py::str(SPARSEKERN_ISAS).attr("split")();
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

// Name -> whether this CPU and its operating system offer it; only what the kernels use or could use.
py::dict cpu_features() {
  py::dict features;
#ifdef __x86_64__
  // The builtin takes literals only.
#define FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512dq");
  FEATURE("avx512vl");
#undef FEATURE
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information and CPU features of sparsekern, for `python -m sparsekern doctor`.";
  module.def("build_info", &build_info, "Compiler, C++ standard and the instruction sets that were built.");
  module.def("cpu_features", &cpu_features, "Instruction sets of this CPU by name; empty where it is not x86-64.");
  if (sparsekern::add_direct_calls(module.ptr())) throw py::error_already_set();
}
