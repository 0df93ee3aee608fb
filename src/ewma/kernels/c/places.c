/* Whether a model's tensors are still the same, at the same places and of the same shapes: asked at every step.

   torch lends what it knows of a tensor as a DLTensor, through a table of functions whose layout DLPack 1 fixes. That
   takes no call of a Python method and no header of torch's. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *previous;
    void (*allocate)(void), (*from_object)(void), (*to_object)(void);
    int (*lend)(void *object, DLTensor *tensor); /* NULL where the owner of the tensors has none */
} Exchange;

/* How a tensor is laid out; ndim sizes and ndim strides follow. */
typedef struct {
    int64_t device, dtype, ndim;
} Layout;

static const Exchange *exchange_of(PyObject *capsule)
{
    const Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (exchange && (exchange->version.major != 1 || !exchange->lend)) {
        PyErr_SetString(PyExc_BufferError, "expected tensors that are lent by DLPack 1");
        return NULL;
    }
    return exchange;
}

static int lend(const Exchange *exchange, PyObject *object, DLTensor *tensor, Layout *layout, uint64_t *address)
{
    if (!object || exchange->lend(object, tensor) != 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_BufferError, "a tensor cannot be lent");
        return -1;
    }
    layout->device = (int64_t)tensor->device.type << 32 | (uint32_t)tensor->device.id;
    layout->dtype = tensor->dtype.code | tensor->dtype.bits << 8 | (int64_t)tensor->dtype.lanes << 16;
    layout->ndim = tensor->ndim;
    *address = (uint64_t)(uintptr_t)tensor->data + tensor->byte_offset;
    return 0;
}

/* places(tensors, exchange) -> (layouts, addresses): first the bytes are counted, then they are written. */
PyObject *py_places(PyObject *module, PyObject *arguments)
{
    PyObject *tensors, *capsule;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!O:places", &PyList_Type, &tensors, &capsule))
        return NULL;
    const Exchange *exchange = exchange_of(capsule);
    if (!exchange)
        return NULL;
    DLTensor tensor;
    Layout layout;
    uint64_t address;
    const Py_ssize_t count = PyList_Size(tensors);
    size_t length = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &layout, &address) < 0)
            return NULL;
        length += sizeof layout + 2 * sizeof(int64_t) * (size_t)tensor.ndim;
    }
    PyObject *layouts = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    PyObject *addresses = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof address), *both = NULL;
    if (!layouts || !addresses)
        goto done;
    char *next = PyBytes_AsString(layouts), *next_address = PyBytes_AsString(addresses);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &layout, &address) < 0)
            goto done;
        const size_t sizes = sizeof(int64_t) * (size_t)tensor.ndim;
        memcpy(next, &layout, sizeof layout);
        if (sizes) {
            memcpy(next + sizeof layout, tensor.shape, sizes);
            memcpy(next + sizeof layout + sizes, tensor.strides, sizes);
        }
        next += sizeof layout + 2 * sizes;
        memcpy(next_address + (size_t)i * sizeof address, &address, sizeof address);
    }
    both = PyTuple_Pack(2, layouts, addresses);
done:
    Py_XDECREF(layouts);
    Py_XDECREF(addresses);
    return both;
}

/* Bytes of the layouts that equal `part` are passed by; 0 where they differ. */
static int passed(const char **layouts, const char *end, const void *part, size_t size)
{
    if ((size_t)(end - *layouts) < size || (size && memcmp(*layouts, part, size) != 0))
        return 0;
    *layouts += size;
    return 1;
}

#ifdef __GNUC__
#define PREFETCH(address) __builtin_prefetch((const void *)(uintptr_t)(address))
#else
#define PREFETCH(address) ((void)(address))
#endif

enum { AHEAD = 12, LINE = 64 };

/* After a training step none of this is in the caches, and torch goes from object to object: without a hint that takes
   twice as long. `parts` are the addresses of each tensor's and its storage's C++ object; they are not read through. */
static void fetch_early(PyObject *tensor, const uint64_t *parts)
{
    PREFETCH((uintptr_t)tensor);
    for (int line = 0; line < 4; line++)
        PREFETCH(parts[0] + LINE * line);
    PREFETCH(parts[1]);
    PREFETCH(parts[1] + LINE);
}

/* moved(tables, members, tensors, parts, exchange, layouts, addresses) -> bool */
PyObject *py_moved(PyObject *module, PyObject *arguments)
{
    PyObject *tables, *members, *tensors, *capsule;
    const char *layouts, *addresses;
    Py_buffer parts;
    Py_ssize_t length, address_length, seen = 0;
    int answer = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!O!O!y*Oy#y#:moved", &PyList_Type, &tables, &PyList_Type, &members,
                          &PyList_Type, &tensors, &parts, &capsule, &layouts, &length, &addresses, &address_length))
        return NULL;
    const Py_ssize_t member_count = PyList_Size(members), count = PyList_Size(tensors);
    const Exchange *exchange = exchange_of(capsule);
    if (exchange && parts.len != count * 2 * (Py_ssize_t)sizeof(uint64_t))
        PyErr_SetString(PyExc_ValueError, "expected two parts for each tensor");
    if (exchange && address_length != count * (Py_ssize_t)sizeof(uint64_t))
        PyErr_SetString(PyExc_ValueError, "expected an address for each tensor");
    if (PyErr_Occurred())
        goto done;
    answer = 1;
    for (Py_ssize_t i = 0; i < PyList_Size(tables); i++) {
        PyObject *table = PyList_GetItem(tables, i), *key, *member;
        Py_ssize_t position = 0;
        while (PyDict_Next(table, &position, &key, &member))
            if (seen >= member_count || PyList_GetItem(members, seen++) != member)
                goto done;
    }
    if (seen != member_count)
        goto done;
    const char *end = layouts + length;
    for (Py_ssize_t i = 0; i < count; i++) {
        DLTensor tensor;
        Layout layout;
        uint64_t address;
        if (i + AHEAD < count)
            fetch_early(PyList_GetItem(tensors, i + AHEAD), (const uint64_t *)parts.buf + 2 * (i + AHEAD));
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &layout, &address) < 0) {
            PyErr_Clear(); /* it was lent before */
            goto done;
        }
        const size_t sizes = sizeof(int64_t) * (size_t)tensor.ndim;
        if (memcmp(addresses + (size_t)i * sizeof address, &address, sizeof address) != 0
            || !passed(&layouts, end, &layout, sizeof layout) || !passed(&layouts, end, tensor.shape, sizes)
            || !passed(&layouts, end, tensor.strides, sizes))
            goto done;
    }
    answer = layouts != end;
done:
    PyBuffer_Release(&parts);
    return answer < 0 ? NULL : PyBool_FromLong(answer);
}
