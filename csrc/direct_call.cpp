// The way from Python to the operator library without torch's dispatcher: tensors come through DLPack's C functions.
#include "direct_call.h"

#include <ATen/dlpack.h>
#include <Python.h>

namespace sparsekern {
namespace {

// Set once, and they stay as long as the process.
DLPackDLTensorFromPyObjectNoSync read = nullptr;
const DirectProduct* library = nullptr;
PyObject *tensor_type, *parameter_type;  // plain tensors
PyObject* watchers;                      // functions that answer 0 or None where nobody records operators
PyObject *is_neg, *empty_strided, *version_name;

// The first entries of a Call of sparsekern/ops/sparse_calls.py.
enum CallEntry { kGiven, kVersions, kDtype, kPlan, kShape, kStrides };

Number number_of(const DLTensor& t) {
  if (t.device.device_type != kDLCPU || t.dtype.lanes != 1) return Number::kOther;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return Number::kFloat32;
  if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return Number::kBFloat16;
  if (t.dtype.code == kDLInt && t.dtype.bits == 32) return Number::kInt32;
  return Number::kOther;
}

bool is_tensor(PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == tensor_type || type == parameter_type;
}

// False if `object` is neither None nor a tensor with memory.
bool read_operand(PyObject* object, Operand& operand) {
  if (object == Py_None) return true;
  if (!is_tensor(object)) return false;
  DLTensor t;
  if (read(object, &t)) {
    PyErr_Clear();  // a tensor without memory: sparse, or wrapped by a transform
    return false;
  }
  if (!t.data) return false;  // torch's tensors of nothing but zeros
  operand = {static_cast<char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, number_of(t), true};
  return true;
}

// Whether the object is None, 0 or False; an error, or if `object` is none, counts as something else.
bool is_nothing(PyObject* object) {
  const int truth = object ? PyObject_IsTrue(object) : 1;
  Py_XDECREF(object);
  PyErr_Clear();
  return truth == 0;
}

// An ordinary tensor that holds its own values, not minus them.
bool is_plain(PyObject* object) { return is_tensor(object) && is_nothing(PyObject_CallOneArg(is_neg, object)); }

// Equal ints or tuples of equal ones. 1.0 and True equal 1 but are refused where 1 is not.
bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyLong_CheckExact(a)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  if (!PyTuple_CheckExact(a) || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i) {
    if (!same(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
  }
  return true;
}

// Whether the tensors were not changed in place since.
bool unchanged(PyObject* tensors, PyObject* versions) {
  if (versions == Py_None) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(versions); ++i) {
    PyObject* const now = PyObject_GetAttr(PyTuple_GET_ITEM(tensors, i), version_name);
    const bool equal = now && PyObject_RichCompareBool(now, PyTuple_GET_ITEM(versions, i), Py_EQ) == 1;
    Py_XDECREF(now);
    PyErr_Clear();
    if (!equal) return false;
  }
  return true;
}

bool is_watched() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers); ++i) {
    if (!is_nothing(PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers, i)))) return true;
  }
  return false;
}

// A reference to the first of `calls` of this geometry whose plan is for such operands, or null.
PyObject* fitting(PyObject* calls, PyObject* geometry, ProductOperands& given) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(calls); ++i) {
    PyObject* const call = PyList_GET_ITEM(calls, i);
    if (!same(PyTuple_GET_ITEM(call, kGiven), geometry)) continue;
    if (read_operand(PyTuple_GET_ITEM(call, kPlan), given.plan) && library->fits(&given)) return Py_NewRef(call);
  }
  return nullptr;
}

// (calls, given, tensors of the structure, input, weight, bias, scale, residual) -> Call or None
PyObject* find(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 8) return PyErr_Format(PyExc_TypeError, "find: expected 8 arguments, got %zd", count);
  ProductOperands given{};
  if (!read_operand(arguments[3], given.input) || !read_operand(arguments[4], given.weight)) Py_RETURN_NONE;
  // Held from here on: what is called next may let another thread run, which may forget the call.
  PyObject* const call = fitting(arguments[0], arguments[1], given);
  bool good = call && unchanged(arguments[2], PyTuple_GET_ITEM(call, kVersions)) && !is_watched();
  for (int i = 3; good && i < 8; ++i) good = arguments[i] == Py_None || is_plain(arguments[i]);
  if (good) return call;
  Py_XDECREF(call);
  Py_RETURN_NONE;
}

// (call, input, weight, bias, scale, residual, low, high) -> the result, None if an operand does not fit
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 8) return PyErr_Format(PyExc_TypeError, "run: expected 8 arguments, got %zd", count);
  PyObject* const call = arguments[0];
  ProductOperands given{};
  given.low = PyFloat_AsDouble(arguments[6]);
  given.high = PyFloat_AsDouble(arguments[7]);
  if (PyErr_Occurred()) return nullptr;
  Operand* const operands[] = {&given.input, &given.weight, &given.bias, &given.scale, &given.residual};
  for (int i = 0; i < 5; ++i) {
    if (!read_operand(arguments[i + 1], *operands[i])) Py_RETURN_NONE;
  }
  PyObject* const form[] = {PyTuple_GET_ITEM(call, kShape), PyTuple_GET_ITEM(call, kStrides),
                            PyTuple_GET_ITEM(call, kDtype)};
  PyObject* const result = PyObject_Vectorcall(empty_strided, form, 3, nullptr);
  if (!result) return nullptr;
  bool done = read_operand(PyTuple_GET_ITEM(call, kPlan), given.plan) && read_operand(result, given.result);
  if (done) {
    Py_BEGIN_ALLOW_THREADS;
    done = library->product(&given);
    Py_END_ALLOW_THREADS;
  }
  if (done) return result;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

// (Tensor.__dlpack_c_exchange_api__, address of sparsekern_direct, Tensor, Parameter, watchers, Tensor.is_neg,
// empty_strided) -> bool: whether it will do.
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *capsule, *address, *tensor, *parameter, *watching, *neg, *empty;
  if (!PyArg_ParseTuple(arguments, "OOOOO!OO", &capsule, &address, &tensor, &parameter, &PyTuple_Type, &watching, &neg,
                        &empty)) {
    return nullptr;
  }
  const auto* const api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  const void* const table = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION) Py_RETURN_FALSE;
  if (!(version_name = PyUnicode_InternFromString("_version"))) return nullptr;
  read = api->dltensor_from_py_object_no_sync;
  library = static_cast<const DirectProduct*>(table);
  tensor_type = Py_NewRef(tensor);
  parameter_type = Py_NewRef(parameter);
  watchers = Py_NewRef(watching);
  is_neg = Py_NewRef(neg);
  empty_strided = Py_NewRef(empty);
  Py_RETURN_TRUE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef functions[] = {
    {"find", fast(find), METH_FASTCALL, nullptr},
    {"run", fast(run), METH_FASTCALL, nullptr},
    {"connect", connect, METH_VARARGS, nullptr},
    {},
};

}  // namespace

int add_direct_calls(PyObject* module) { return PyModule_AddFunctions(module, functions); }

}  // namespace sparsekern
