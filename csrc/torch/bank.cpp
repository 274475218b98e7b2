#include "torch/bank.h"

#include <string>

using namespace pybind11::literals;

namespace axiscap {
namespace {

constexpr const char* kBankNames[] = {"axes", "floors", "lifts", "limits"};

}  // namespace

KeptBank::KeptBank(const py::object& axes, const py::object& floors, const py::object& lifts, const py::object& limits)
    : objects{axes, floors, lifts, limits} {
  std::array<Tensor, 4> tensors;
  const auto is_given = [&](int i) { return i < 2 || !objects[i].is_none(); };
  for (int i = 0; i < 4; ++i) {
    if (!is_given(i)) continue;
    check_is_tensor(objects[i].ptr(), kBankNames[i]);
    const py::object device = objects[i].attr("device"), wanted = axes.attr("device");
    CHECK_VALUE(device.equal(wanted), kBankNames[i], " must be on the device of axes, ", std::string(py::str(wanted)),
                ", got ", std::string(py::str(device)));
  }
  for (int i = 0; i < 4; ++i) {
    if (!is_given(i)) continue;
    CHECK_VALUE(tensors[i].read(objects[i].ptr(), false) && !tensors[i].is_negated(),
                "a bank is made of dense tensors with data");
    exports[i] = py::module_::import("torch.utils.dlpack").attr("to_dlpack")(objects[i]);
    data[i] = tensors[i].data;
    numels[i] = tensors[i].numel;
  }
  const Bank bank = bank_of(tensors);
  bank.check();
  bank.check_values();
}

bool KeptBank::read(std::array<Tensor, 4>& tensors, Bank& bank) const {
  for (int i = 0; i < 4; ++i)
    if (data[i] && (!tensors[i].read(objects[i].ptr(), false) || tensors[i].data != data[i] ||
                    tensors[i].numel != numels[i] || !tensors[i].is_contiguous()))
      return false;
  bank = bank_of(tensors);
  const Sizes axes = bank.axes->sizes, floors = bank.floors->sizes;
  return axes.count == 3 && floors == axes.first(2) && (!bank.lifts || bank.lifts->sizes == axes) &&
         (!bank.limits || bank.limits->sizes == floors);
}

namespace {

// Bank.cap_: the op with a bank that needs no more checks.
PyObject* cap_with_bank(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  static const Signature signature("cap_(Tensor(a!) hidden, Tensor? slots=None, Tensor(z!)? projections=None) -> ()");
  return call_guarded([&] {
    // The method descriptor has checked the type of self; pybind11's cast would look it up once more.
    const auto& kept = *reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<KeptBank>();
    BoundArguments bound;
    std::array<Tensor, 4> tensors;
    Bank bank;
    if (bound.bind(signature, {arguments, count, names}, false) && kept.read(tensors, bank)) {
      bound.axes = bank.axes, bound.floors = bank.floors, bound.lifts = bank.lifts, bound.limits = bank.limits;
      for (int i = 0; i < 4; ++i)
        if (kept.data[i]) bound.parts[bound.parts_count++] = {&tensors[i], kBankNames[i], false};
      return cap_with_checked_bank_(bound).release().ptr();
    }
    const auto given = [&](int i) {
      return py::reinterpret_borrow<py::object>(bound.given[i] ? bound.given[i] : Py_None);
    };
    const py::object op = py::module_::import("axiscap._C").attr("cap_");
    return op(given(0), kept.objects[0], kept.objects[1], given(1), "lifts"_a = kept.objects[2],
              "limits"_a = kept.objects[3], "projections"_a = given(2))
        .release()
        .ptr();
  });
}

}  // namespace

void define_bank(py::module_& m) {
  py::class_<KeptBank> bank(m, "Bank");
  bank.def(py::init<const py::object&, const py::object&, const py::object&, const py::object&>(), "axes"_a, "floors"_a,
           "lifts"_a = py::none(), "limits"_a = py::none());
  for (int i = 0; i < 4; ++i)
    bank.def_property_readonly(kBankNames[i], [i](const KeptBank& kept) { return kept.objects[i]; });
  static PyMethodDef cap{"cap_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cap_with_bank)),
                         METH_FASTCALL | METH_KEYWORDS, "cap_(hidden, slots=None, projections=None)"};
  bank.attr("cap_") =
      py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bank.ptr()), &cap));
}

}  // namespace axiscap
