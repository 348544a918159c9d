// wave64._hip: the runtime, and launches of every registered op. The only file that knows Python.
//
//     launch("rms_norm", x=x, weight=weight, out=out, x_stride=x.stride(0), ..., dtype=x.dtype)
//
// names the fields of the op's struct. A pointer field takes a tensor, or None for null, one of several pointers a
// tuple of addresses; a field for a dtype takes torch's. What a tensor is, and which stream is current, `connect` is
// told: nothing of torch is included or linked. Status codes become exceptions: ValueError for a refused argument,
// _hip.Unavailable where nothing can serve, RuntimeError where the GPU runtime failed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "runtime.h"

namespace py = pybind11;
using namespace wave64;

namespace {

class Unavailable : public std::runtime_error {
    using std::runtime_error::runtime_error;
};
PyObject* unavailable;

void raise_unless_ok(int32_t status) {
    if (status == kOk) return;
    if (status == kBadArgument) throw py::value_error(last_error());
    if (status == kUnavailable) throw Unavailable(last_error());
    throw std::runtime_error(last_error());
}

// What `connect` was told of torch.
struct Torch {
    PyTypeObject* tensor = nullptr;
    // Tensor's methods, then functions: device, stream of a device, and the device as it was before another was set.
    PyObject *data_ptr = nullptr, *get_device = nullptr, *current_device = nullptr, *current_stream = nullptr,
             *exchange_device = nullptr;
    PyObject* dtypes = nullptr;  // {torch.dtype: code}
} torch;

void connect(const py::type& tensor, const py::object& data_ptr, const py::object& get_device,
             const py::object& current_device, const py::object& current_stream, const py::object& exchange_device,
             const py::dict& dtypes) {
    const auto keep = [](PyObject*& to, const py::handle& value) {
        PyObject* const before = std::exchange(to, value.inc_ref().ptr());
        Py_XDECREF(before);
    };
    Py_INCREF(tensor.ptr());
    Py_XDECREF(std::exchange(torch.tensor, reinterpret_cast<PyTypeObject*>(tensor.ptr())));
    keep(torch.data_ptr, data_ptr), keep(torch.get_device, get_device), keep(torch.current_device, current_device);
    keep(torch.current_stream, current_stream), keep(torch.exchange_device, exchange_device);
    keep(torch.dtypes, dtypes);
}

bool is_tensor(PyObject* value) { return torch.tensor && PyObject_TypeCheck(value, torch.tensor); }

// The number that a function of torch's gives.
template <typename... Arguments>
int64_t ask(PyObject* function, Arguments... arguments) {
    PyObject* const given[] = {nullptr, arguments...};
    const auto answer = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(function, given + 1, sizeof...(arguments) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    if (!answer) throw py::error_already_set();
    // Addresses and streams use all 64 bits.
    const auto number = PyLong_AsUnsignedLongLongMask(answer.ptr());
    if (number == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return int64_t(number);
}

template <typename T>
void put(char* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// What a field takes, for errors.
std::string takes(const Field& field) {
    if (field.is_dtype) {
        std::string names;
        for (auto [dtype, code] : py::reinterpret_borrow<py::dict>(torch.dtypes))
            names += (names.empty() ? "" : ", ") + std::string(py::str(dtype));
        return "one of " + names;
    }
    switch (field.kind) {
        case 'f':
            return "a number";
        case 'P':
            return "a tensor or None";
        case 'A':
            return "a tuple of at most 8 addresses";
        case 'q':
            return "a 64-bit integer";
        default:
            return "a 32-bit integer";
    }
}

// A tuple of addresses, nulls behind it. False, with a Python error set or not, for another value.
bool put_addresses(char* at, PyObject* value) {
    Addresses all{};
    if (!PyTuple_Check(value) || size_t(PyTuple_GET_SIZE(value)) > std::size(all.at)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); i++) {
        all.at[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(value, i));
        if (!all.at[i] && PyErr_Occurred()) return false;
    }
    put(at, all);
    return true;
}

// False, with a Python error set or not, where `value` is not what the field takes. A tensor counts as no number: to
// read it would wait for the GPU.
bool put_field(char* args, const Field& field, PyObject* value) {
    char* const at = args + field.offset;
    if (field.kind == 'P') {
        if (is_tensor(value)) return put(at, ask(torch.data_ptr, value)), true;
        return put(at, int64_t(0)), value == Py_None;
    }
    if (field.kind == 'A') return put_addresses(at, value);
    if (field.is_dtype) {
        value = torch.dtypes ? PyDict_GetItemWithError(torch.dtypes, value) : nullptr;
        if (!value) return false;
    } else if (is_tensor(value)) {
        return false;
    }
    if (field.kind == 'f') {
        const double number = PyFloat_AsDouble(value);
        put(at, float(number));
        return number != -1.0 || !PyErr_Occurred();
    }
    const auto number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) return false;
    if (field.kind == 'q') return put(at, int64_t(number)), true;
    put(at, int32_t(number));
    return number >= std::numeric_limits<int32_t>::min() && number <= std::numeric_limits<int32_t>::max();
}

constexpr size_t kMaxFields = 64;
constexpr size_t kMaxArgsBytes = 1024;
using Order = std::array<uint8_t, kMaxFields>;  // of a call's arguments: the field of each

// An op with its fields' names as Python has them, and the order of its last call: a call in the source passes the same
// tuple of names each time.
struct Callee {
    const Op* op;
    std::vector<py::object> names;  // interned
    py::object last_names;
    Order last_order;

    [[noreturn]] void refuse(const std::string& what) const {
        throw py::type_error(std::string(op->name) + ": " + what);
    }

    size_t field(PyObject* name) const {
        for (size_t i = 0; i < names.size(); i++)
            if (names[i].ptr() == name) return i;
        for (size_t i = 0; i < names.size(); i++)
            if (PyUnicode_Compare(names[i].ptr(), name) == 0) return i;
        std::string all;
        for (const Field& each : op->fields) all += (all.empty() ? "" : ", ") + std::string(each.name);
        refuse("there is no field " + std::string(py::str(name)) + "; its fields are " + all);
    }

    // Whether the names are those of the last call, in the same order; a call with **fields has a tuple of its own.
    bool is_last(PyObject* call_names) const {
        if (!call_names || !last_names || call_names == last_names.ptr()) return call_names && last_names;
        const Py_ssize_t count = PyTuple_GET_SIZE(call_names);
        if (count != PyTuple_GET_SIZE(last_names.ptr())) return false;
        for (Py_ssize_t i = 0; i < count; i++)
            if (PyTuple_GET_ITEM(call_names, i) != PyTuple_GET_ITEM(last_names.ptr(), i)) return false;
        return true;
    }

    // A copy, since what is called while arguments are read may launch the op from another thread.
    Order order_of(PyObject* call_names) {
        if (is_last(call_names)) return last_order;
        Order order{};
        std::vector<bool> given(names.size());
        const size_t count = call_names ? PyTuple_GET_SIZE(call_names) : 0;
        for (size_t i = 0; i < count; i++) {
            const size_t at = field(PyTuple_GET_ITEM(call_names, i));
            if (given[at]) refuse("the field " + std::string(op->fields[at].name) + " is given twice");
            given[at] = true, order[i] = uint8_t(at);
        }
        for (size_t i = 0; i < names.size(); i++)
            if (!given[i]) refuse("the field " + std::string(op->fields[i].name) + " is missing");
        last_names = py::reinterpret_borrow<py::object>(call_names), last_order = order;
        return order;
    }
};

// Kept for the process, as the extension is: no destructor may run after Python's end.
std::vector<Callee>& callees() {
    static auto* const all = new std::vector<Callee>;
    return *all;
}
PyObject* index_of_op;  // {name: index in callees()}

// The list that this thread's launches are kept in, while it records.
thread_local PyObject* kept_in = nullptr;

struct KeptLaunch : RecordedLaunch {
    py::dict tensors;  // by field: what the launch may touch
};

void keep_launches(const Callee& callee, const Order& order, PyObject* const* values) {
    std::vector<RecordedLaunch> launches = record_take();
    if (launches.empty()) return;
    py::dict tensors;
    for (size_t i = 0; i < callee.names.size(); i++)
        if (callee.op->fields[order[i]].kind == 'P' && values[i] != Py_None)
            tensors[callee.names[order[i]]] = py::handle(values[i]);
    for (RecordedLaunch& made : launches)
        py::reinterpret_borrow<py::list>(kept_in).append(KeptLaunch{std::move(made), tensors});
}

// Runs on the device of `tensor`, on its current stream.
void run_on_device(const Op& op, const char* args, PyObject* tensor) {
    int64_t stream = 0, device = 0, before = 0;
    const bool is_recorded = recording_active();
    if (!is_recorded) {
        device = tensor ? ask(torch.get_device, tensor) : -1;
        if (device < 0)
            throw py::value_error(
                std::string(op.name) + ": expected GPU tensors outside of record(), got " +
                (tensor ? "one on " + std::string(py::str(py::handle(tensor).attr("device"))) : std::string("none")));
        before = ask(torch.current_device);
    }
    const auto set_device = [](int64_t index) { ask(torch.exchange_device, py::int_(index).ptr()); };
    if (before != device) set_device(device);
    int32_t status;
    try {
        if (!is_recorded) stream = ask(torch.current_stream, py::int_(device).ptr());
        py::gil_scoped_release unlocked;
        status = op.run(args, reinterpret_cast<void*>(stream));
    } catch (...) {
        if (before != device) set_device(before);
        throw;
    }
    if (before != device) set_device(before);
    raise_unless_ok(status);
}

void call(PyObject* const* positional, size_t count, PyObject* const* values, PyObject* names) {
    PyObject* const found = count == 1 || count == 2 ? PyDict_GetItemWithError(index_of_op, positional[0]) : nullptr;
    if (!found) {
        if (PyErr_Occurred()) throw py::error_already_set();
        throw py::type_error(count == 1 || count == 2
                                 ? "launch: there is no operator " + std::string(py::repr(positional[0]))
                                 : "launch(op, tensor=None, /, **fields): pass the operator's fields by name");
    }
    Callee& callee = callees()[PyLong_AsSize_t(found)];
    PyObject* tensor = count == 2 && positional[1] != Py_None ? positional[1] : nullptr;
    if (tensor && !is_tensor(tensor))
        callee.refuse("expected a tensor of the device to run on, got " + std::string(py::repr(tensor)));
    const Order order = callee.order_of(names);
    alignas(16) char args[kMaxArgsBytes] = {};
    for (size_t i = 0; i < callee.names.size(); i++) {
        const Field& field = callee.op->fields[order[i]];
        PyObject* const value = values[i];
        if (!put_field(args, field, value)) {
            PyErr_Clear();
            callee.refuse(std::string(field.name) + ": expected " + takes(field) + ", got " +
                          (is_tensor(value) ? "a tensor" : std::string(py::repr(value))));
        }
        if (!tensor && field.kind == 'P' && value != Py_None) tensor = value;
    }
    try {
        run_on_device(*callee.op, args, tensor);
    } catch (...) {
        if (recording_active()) keep_launches(callee, order, values);
        throw;
    }
    if (recording_active()) keep_launches(callee, order, values);
}

PyObject* launch_fields(PyObject*, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
    try {
        call(arguments, size_t(count), arguments + count, names);
    } catch (py::error_already_set& error) {
        error.restore();
        return nullptr;
    } catch (const Unavailable& error) {
        PyErr_SetString(unavailable, error.what());
        return nullptr;
    } catch (const py::builtin_exception& error) {
        error.set_error();
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyMethodDef launch_method = {
    "launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch_fields)), METH_FASTCALL | METH_KEYWORDS,
    "launch(op, tensor=None, /, **fields)\n--\n\nLaunches an operator with the fields of its struct by name, on the "
    "device of `tensor`, or of the first field that is one, and on its current stream."};

py::dict fields_of_ops() {
    py::dict all;
    for (const Op& op : ops()) {
        py::list fields;
        for (const Field& field : op.fields)
            fields.append(
                py::make_tuple(field.name, field.kind == 'A' ? "8P" : std::string(1, field.kind), field.offset));
        all[op.name] = fields;
    }
    return all;
}

}  // namespace

PYBIND11_MODULE(_hip, m) {
    m.doc() = "Native operators: launches on HIP streams, or recordings of launches.";
    unavailable = py::register_exception<Unavailable>(m, "Unavailable", PyExc_RuntimeError).inc_ref().ptr();

    py::class_<Device>(m, "Device", "A GPU as kernels are planned for it.")
        .def(py::init<std::string, int, int, int>(), py::arg("arch"), py::arg("compute_units"), py::arg("wave_size"),
             py::arg("lds_bytes"))
        .def_readonly("arch", &Device::arch)
        .def_readonly("compute_units", &Device::compute_units)
        .def_readonly("wave_size", &Device::wave_size)
        .def_readonly("lds_bytes", &Device::lds_bytes);

    py::class_<KeptLaunch>(
        m, "Launch",
        "A launch that was kept: grid in blocks, block in lanes, args as bytes, tensors as {field: tensor}.")
        .def_readonly("op", &KeptLaunch::op)
        .def_readonly("kernel", &KeptLaunch::kernel)
        .def_readonly("code_object", &KeptLaunch::code_object)
        .def_property_readonly("grid", [](const KeptLaunch& self) { return py::tuple(py::cast(self.grid)); })
        .def_property_readonly("block", [](const KeptLaunch& self) { return py::tuple(py::cast(self.block)); })
        .def_readonly("lds_bytes", &KeptLaunch::lds_bytes)
        .def_property_readonly("args", [](const KeptLaunch& self) { return py::bytes(self.args); })
        .def_readonly("tensors", &KeptLaunch::tensors);

    m.def(
        "open_runtime",
        [](const std::vector<std::string>& candidates, bool is_named) {
            std::string path;
            raise_unless_ok(open_runtime(candidates, is_named, &path));
            return path;
        },
        py::arg("candidates"), py::arg("is_named") = false,
        "Opens the GPU runtime, the process's own or the first candidate that can be opened; is_named: the candidate, "
        "whatever the process has loaded. The first call decides. Gives the path of the library that is open.");
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
    const auto of_address = [](int32_t (*function)(void*)) {
        return [function](uintptr_t address) { raise_unless_ok(function(reinterpret_cast<void*>(address))); };
    };
    m.def(
        "allocate_shared",
        [](size_t bytes) {
            void* address;
            raise_unless_ok(allocate_shared(bytes, &address));
            return reinterpret_cast<uintptr_t>(address);
        },
        py::arg("bytes"),
        "Memory of the current device that other processes can map, uncached and zeroed; its address.");
    m.def("free_shared", of_address(free_shared), py::arg("address"));
    m.def(
        "export_shared",
        [](uintptr_t address) {
            std::string handle;
            raise_unless_ok(export_shared(reinterpret_cast<void*>(address), &handle));
            return py::bytes(handle);
        },
        py::arg("address"), "The handle, 64 bytes, by which another process maps the memory.");
    m.def(
        "open_shared",
        [](const py::bytes& handle) {
            void* address;
            raise_unless_ok(open_shared(handle, &address));
            return reinterpret_cast<uintptr_t>(address);
        },
        py::arg("handle"), "Where this process's current device finds the memory that another process has exported.");
    m.def("close_shared", of_address(close_shared), py::arg("address"));
    m.def(
        "can_access_peer",
        [](int device, int peer) {
            bool can;
            raise_unless_ok(can_access_peer(device, peer, &can));
            return can;
        },
        py::arg("device"), py::arg("peer"), "Whether device `device` reaches memory of device `peer`.");
    m.def(
        "allocate_mapped",
        [](size_t bytes) {
            void *host, *device;
            raise_unless_ok(allocate_mapped(bytes, &host, &device));
            return py::make_tuple(reinterpret_cast<uintptr_t>(host), reinterpret_cast<uintptr_t>(device));
        },
        py::arg("bytes"),
        "Memory of the host, zeroed, that kernels can write to: the host's address and the device's.");
    m.def("free_mapped", of_address(free_mapped), py::arg("host"));
    m.def("code_object_folder", &code_object_folder, "Where <arch>/<op>.co lie.");
    m.def(
        "record_begin",
        [](const Device& device, const py::list& launches) {
            raise_unless_ok(record_begin(device));
            kept_in = launches.inc_ref().ptr();
        },
        py::arg("device"), py::arg("launches"),
        "From here on this thread's launches are planned for `device` and appended to `launches`, not made.");
    m.def("recording", &recording_active, "Whether this thread records.");
    m.def(
        "record_end",
        [] {
            record_end();
            Py_XDECREF(std::exchange(kept_in, nullptr));
        },
        "Ends this thread's recording.");
    m.def("fields", &fields_of_ops, "{op: [(field, struct code, offset), ...]}, in the order of its struct.");
    m.def("connect", &connect, py::kw_only(), py::arg("tensor"), py::arg("data_ptr"), py::arg("get_device"),
          py::arg("current_device"), py::arg("current_stream"), py::arg("exchange_device"), py::arg("dtypes"),
          "Says what a tensor is and how to ask for addresses, devices and streams; dtypes: {torch.dtype: code}.");
    m.attr("launch") = py::reinterpret_steal<py::object>(PyCFunction_New(&launch_method, nullptr));
    for (auto [name, code] : {std::pair{"BF16", kBf16}, {"FP16", kFp16}, {"FP32", kFp32}, {"FP8", kFp8}})
        m.attr(name) = int(code);

    index_of_op = PyDict_New();
    for (const Op& op : ops()) {
        if (op.fields.size() > kMaxFields || op.args_size > kMaxArgsBytes)
            throw std::runtime_error(std::string(op.name) + ": its struct is too large for launch()");
        Callee callee{&op, {}, {}, {}};
        for (const Field& field : op.fields)
            callee.names.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(field.name)));
        py::reinterpret_borrow<py::dict>(index_of_op)[op.name] = callees().size();
        callees().push_back(std::move(callee));
        auto constants = m.def_submodule(op.name, "Constants of hip/ops/<op>.hip that its adapter needs.");
        for (const Constant& constant : op.constants) constants.attr(constant.name) = constant.value;
    }
}
