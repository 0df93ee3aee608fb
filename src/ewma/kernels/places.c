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

/* What is noted of each tensor; ndim sizes and ndim strides follow. */
typedef struct {
    int64_t data, byte_offset, device, dtype, ndim;
} Place;

static const Exchange *exchange_of(PyObject *capsule)
{
    const Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (exchange && (exchange->version.major != 1 || !exchange->lend)) {
        PyErr_SetString(PyExc_BufferError, "expected tensors that are lent by DLPack 1");
        return NULL;
    }
    return exchange;
}

static int lend(const Exchange *exchange, PyObject *object, DLTensor *tensor, Place *place)
{
    if (!object || exchange->lend(object, tensor) != 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_BufferError, "a tensor cannot be lent");
        return -1;
    }
    place->data = (int64_t)(intptr_t)tensor->data;
    place->byte_offset = (int64_t)tensor->byte_offset;
    place->device = (int64_t)tensor->device.type << 32 | (uint32_t)tensor->device.id;
    place->dtype = tensor->dtype.code | tensor->dtype.bits << 8 | (int64_t)tensor->dtype.lanes << 16;
    place->ndim = tensor->ndim;
    return 0;
}

/* places(tensors, exchange) -> bytes: first their number is counted, then they are written. */
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
    Place place;
    size_t length = 0;
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); i++) {
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &place) < 0)
            return NULL;
        length += sizeof place + 2 * sizeof(int64_t) * (size_t)tensor.ndim;
    }
    PyObject *noted = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    char *next = noted ? PyBytes_AsString(noted) : NULL;
    for (Py_ssize_t i = 0; noted && i < PyList_Size(tensors); i++) {
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &place) < 0) {
            Py_CLEAR(noted);
            break;
        }
        const size_t sizes = sizeof(int64_t) * (size_t)tensor.ndim;
        memcpy(next, &place, sizeof place);
        if (sizes) {
            memcpy(next + sizeof place, tensor.shape, sizes);
            memcpy(next + sizeof place + sizes, tensor.strides, sizes);
        }
        next += sizeof place + 2 * sizes;
    }
    return noted;
}

/* The noted bytes that equal `part` are passed by; 0 where they differ. */
static int passed(const char **noted, const char *end, const void *part, size_t size)
{
    if ((size_t)(end - *noted) < size || (size && memcmp(*noted, part, size) != 0))
        return 0;
    *noted += size;
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

/* moved(tables, members, tensors, parts, exchange, noted) -> bool */
PyObject *py_moved(PyObject *module, PyObject *arguments)
{
    PyObject *tables, *members, *tensors, *capsule;
    const char *noted;
    Py_buffer parts;
    Py_ssize_t length, seen = 0;
    int answer = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!O!O!y*Oy#:moved", &PyList_Type, &tables, &PyList_Type, &members, &PyList_Type,
                          &tensors, &parts, &capsule, &noted, &length))
        return NULL;
    const Py_ssize_t member_count = PyList_Size(members), count = PyList_Size(tensors);
    const Exchange *exchange = exchange_of(capsule);
    if (exchange && parts.len != count * 2 * (Py_ssize_t)sizeof(uint64_t))
        PyErr_SetString(PyExc_ValueError, "expected two parts for each tensor");
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
    const char *end = noted + length;
    for (Py_ssize_t i = 0; i < count; i++) {
        DLTensor tensor;
        Place place;
        if (i + AHEAD < count)
            fetch_early(PyList_GetItem(tensors, i + AHEAD), (const uint64_t *)parts.buf + 2 * (i + AHEAD));
        if (lend(exchange, PyList_GetItem(tensors, i), &tensor, &place) < 0) {
            PyErr_Clear(); /* it was lent before */
            goto done;
        }
        const size_t sizes = sizeof(int64_t) * (size_t)tensor.ndim;
        if (!passed(&noted, end, &place, sizeof place) || !passed(&noted, end, tensor.shape, sizes)
            || !passed(&noted, end, tensor.strides, sizes))
            goto done;
    }
    answer = noted != end;
done:
    PyBuffer_Release(&parts);
    return answer < 0 ? NULL : PyBool_FromLong(answer);
}
