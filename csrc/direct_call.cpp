// The way from Python to the operator library without torch's dispatcher: tensors come through DLPack's C functions.
#include "direct_call.h"

#include <ATen/dlpack.h>
#include <Python.h>

namespace sparsekern {
namespace {

DLPackDLTensorFromPyObjectNoSync read = nullptr;
DirectProduct run = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;

Number number_of(const DLTensor& t) {
  if (t.device.device_type != kDLCPU || t.dtype.lanes != 1) return Number::kOther;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return Number::kFloat32;
  if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return Number::kBFloat16;
  if (t.dtype.code == kDLInt && t.dtype.bits == 32) return Number::kInt32;
  return Number::kOther;
}

// False if `object` is neither None nor a plain tensor.
bool read_operand(PyObject* object, Operand& operand) {
  if (object == Py_None) return true;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) return false;
  DLTensor t;
  if (read(object, &t)) {
    PyErr_Clear();  // a tensor without strides
    return false;
  }
  if (!t.data) return false;  // torch's tensors of nothing but zeros
  operand = {static_cast<char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, number_of(t), true};
  return true;
}

// (input, weight, plan, bias, scale, residual, result, low, high) -> bool, like the operator _sparse_product_cpu.
PyObject* product(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!run) Py_RETURN_FALSE;
  if (count != 9) {
    PyErr_Format(PyExc_TypeError, "product: expected 9 arguments, got %zd", count);
    return nullptr;
  }
  ProductOperands given{};
  Operand* const operands[] = {&given.input, &given.weight,   &given.plan,  &given.bias,
                               &given.scale, &given.residual, &given.result};
  for (int i = 0; i < 7; ++i) {
    if (!read_operand(arguments[i], *operands[i])) Py_RETURN_FALSE;
  }
  given.low = PyFloat_AsDouble(arguments[7]);
  given.high = PyFloat_AsDouble(arguments[8]);
  if (PyErr_Occurred()) return nullptr;
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = run(&given);
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(done);
}

// (Tensor.__dlpack_c_exchange_api__, address of sparsekern_product, Tensor, Parameter) -> bool: whether it will do.
// They stay as long as the process.
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *capsule, *address;
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(arguments, "OOOO", &capsule, &address, &tensor, &parameter)) return nullptr;
  const auto* const api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  void* const function = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION) Py_RETURN_FALSE;
  read = api->dltensor_from_py_object_no_sync;
  run = reinterpret_cast<DirectProduct>(function);
  tensor_type = Py_NewRef(tensor);
  parameter_type = Py_NewRef(parameter);
  Py_RETURN_TRUE;
}

PyMethodDef functions[] = {
    {"product", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(product)), METH_FASTCALL, nullptr},
    {"connect", connect, METH_VARARGS, nullptr},
    {},
};

}  // namespace

int add_direct_calls(PyObject* module) { return PyModule_AddFunctions(module, functions); }

}  // namespace sparsekern
