// wave64._hip: the runtime and every registered op as Python functions. The only file that knows Python.
//
// An op takes its struct's fields by position, addresses as integers, then the stream. Status codes become exceptions:
// ValueError for a refused argument, _hip.Unavailable where nothing can serve, RuntimeError where the GPU runtime
// failed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>

#include "runtime.h"

namespace py = pybind11;
using namespace wave64;

namespace {

class Unavailable : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

void raise_unless_ok(int32_t status) {
    if (status == kOk) return;
    if (status == kBadArgument) throw py::value_error(wave64_error());
    if (status == kUnavailable) throw Unavailable(wave64_error());
    throw std::runtime_error(wave64_error());
}

std::string signature(const Op& op) {
    std::string text = std::string(op.name) + "(";
    for (const Field& field : op.fields) text += std::string(field.name) + ", ";
    return text + "stream)";
}

template <typename T>
void put(char* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// False, with a Python error set or not, where `value` is not of the field's kind.
bool put_field(char* at, char kind, PyObject* value) {
    if (kind == 'f') {
        const double number = PyFloat_AsDouble(value);
        put(at, float(number));
        return number != -1.0 || !PyErr_Occurred();
    }
    if (kind == 'P') {
        const auto address = PyLong_AsUnsignedLongLong(value);
        put(at, uintptr_t(address));
        return address != static_cast<unsigned long long>(-1) || !PyErr_Occurred();
    }
    const auto number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) return false;
    if (kind == 'q') {
        put(at, int64_t(number));
        return true;
    }
    put(at, int32_t(number));
    return number >= std::numeric_limits<int32_t>::min() && number <= std::numeric_limits<int32_t>::max();
}

const char* kind_words(char kind) {
    switch (kind) {
        case 'f':
            return "a number";
        case 'P':
            return "an address";
        case 'q':
            return "a 64-bit integer";
        default:
            return "a 32-bit integer";
    }
}

void call(const Op& op, const py::args& values) {
    alignas(16) char args[1024] = {};
    const size_t count = op.fields.size() + 1;
    if (values.size() != count)
        throw py::type_error(signature(op) + ": expected " + std::to_string(count) + " arguments, got " +
                             std::to_string(values.size()));
    const auto convert = [&](char* at, const char* name, char kind, size_t i) {
        PyObject* value = PyTuple_GET_ITEM(values.ptr(), i);
        if (put_field(at, kind, value)) return;
        PyErr_Clear();
        throw py::type_error(std::string(op.name) + ": " + name + ": expected " + kind_words(kind) + ", got " +
                             std::string(py::repr(value)));
    };
    for (size_t i = 0; i < op.fields.size(); i++)
        convert(args + op.fields[i].offset, op.fields[i].name, op.fields[i].kind, i);
    void* stream;
    convert(reinterpret_cast<char*>(&stream), "stream", 'P', count - 1);

    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = op.run(args, stream);
    }
    raise_unless_ok(status);
}

py::dict fields_of_ops() {
    py::dict all;
    for (const Op& op : ops()) {
        py::list fields;
        for (const Field& field : op.fields)
            fields.append(py::make_tuple(field.name, std::string(1, field.kind), field.offset));
        all[op.name] = fields;
    }
    return all;
}

}  // namespace

PYBIND11_MODULE(_hip, m) {
    m.doc() = "Native operators: launches on HIP streams, or recordings of launches.";
    py::register_exception<Unavailable>(m, "Unavailable", PyExc_RuntimeError);

    py::class_<Device>(m, "Device", "A GPU as kernels are planned for it.")
        .def(py::init<std::string, int, int, int>(), py::arg("arch"), py::arg("compute_units"), py::arg("wave_size"),
             py::arg("lds_bytes"))
        .def_readonly("arch", &Device::arch)
        .def_readonly("compute_units", &Device::compute_units)
        .def_readonly("wave_size", &Device::wave_size)
        .def_readonly("lds_bytes", &Device::lds_bytes);

    py::class_<RecordedLaunch>(m, "Launch", "A launch that was kept: grid in blocks, block in lanes, args as bytes.")
        .def_readonly("op", &RecordedLaunch::op)
        .def_readonly("kernel", &RecordedLaunch::kernel)
        .def_readonly("code_object", &RecordedLaunch::code_object)
        .def_property_readonly("grid", [](const RecordedLaunch& self) { return py::tuple(py::cast(self.grid)); })
        .def_property_readonly("block", [](const RecordedLaunch& self) { return py::tuple(py::cast(self.block)); })
        .def_readonly("lds_bytes", &RecordedLaunch::lds_bytes)
        .def_property_readonly("args", [](const RecordedLaunch& self) { return py::bytes(self.args); });

    m.def(
        "open_runtime",
        [](const std::vector<std::string>& candidates) {
            std::string path;
            raise_unless_ok(open_runtime(candidates, &path));
            return path;
        },
        py::arg("candidates"),
        "Opens the GPU runtime, the process's own or the first candidate that can be opened; gives its library's "
        "path.");
    m.def(
        "load", [](const std::string& op) { raise_unless_ok(load(op.c_str())); }, py::arg("op"),
        "Loads an op's code object for the current device.");
    m.def("device_count", [] {
        int count;
        raise_unless_ok(device_count(&count));
        return count;
    });
    m.def(
        "device",
        [](int index) {
            const Device* device;
            raise_unless_ok(device_at(index, &device));
            return *device;
        },
        py::arg("index"));
    m.def("code_object_folder", &code_object_folder, "Where <arch>/<op>.co lie.");
    m.def(
        "record_begin", [](const Device& device) { raise_unless_ok(record_begin(device)); }, py::arg("device"),
        "From here on this thread's launches are kept, planned for `device`, instead of made.");
    m.def("recording", &recording_active, "Whether this thread records.");
    m.def("record_end", &record_end, "Ends this thread's recording and gives its launches.");
    m.def("fields", &fields_of_ops, "{op: [(field, struct code, offset), ...]}, in the order an op takes them.");

    for (const Op& op : ops())
        m.attr(op.name) = py::cpp_function([&op](const py::args& values) { call(op, values); }, py::name(op.name),
                                           py::doc(signature(op).c_str()));
}
