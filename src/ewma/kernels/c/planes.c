/* Arrays and numbers as Python gives them: what they are and where, checked before anything is read. */

#include "scan.h"

int fail(const char *what) { PyErr_SetString(PyExc_ValueError, what); return -1; }

int read_plane(Plane *plane, const Py_buffer *view, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t inner)
{
    const char *format = view->format ? view->format : "B";
    if (format[0] == '\0' || format[1] != '\0' || !strchr("fdhe", format[0]))
        return fail("scan: expected native float32, float64, float16, or the bits of bfloat16 as int16");
    plane->dtype = format[0] == 'f' ? FLOAT32 : format[0] == 'd' ? FLOAT64 : format[0] == 'h' ? BFLOAT16 : FLOAT16;
    const ptrdiff_t size = (ptrdiff_t)size_of(plane->dtype);
    if (view->ndim != 3 || view->shape[0] != outer || view->shape[1] != n || view->shape[2] != inner)
        return fail("scan: expected x and out of one shape, (outer, n, inner)");
    if ((uintptr_t)view->buf % (uintptr_t)size)
        return fail("scan: expected aligned memory");
    plane->data = view->buf;
    for (int k = 0; k < 3; k++) {
        if (view->strides[k] % size)
            return fail("scan: expected aligned memory");
        plane->step[k] = view->shape[k] > 1 ? view->strides[k] / size : 0;
    }
    return 0;
}

/* Where a plane's memory begins and ends. */
static void extent(const Py_buffer *view, uintptr_t *begin, uintptr_t *end)
{
    *begin = (uintptr_t)view->buf;
    *end = *begin + (size_t)view->itemsize;
    for (int k = 0; k < 3; k++) {
        const ptrdiff_t whole = (view->shape[k] - 1) * view->strides[k];
        *(whole < 0 ? begin : end) += (uintptr_t)whole;
    }
}

int check_apart(const Py_buffer *x, const Py_buffer *out)
{
    uintptr_t x_begin, x_end, out_begin, out_end;
    extent(x, &x_begin, &x_end);
    extent(out, &out_begin, &out_end);
    return x_begin < out_end && out_begin < x_end ? fail("scan: expected out that shares no memory with x") : 0;
}

/* One float64 for each of `count`; `view` is to be released where it has an object. */
int read_vector(const double **vector, PyObject *object, Py_buffer *view, ptrdiff_t count, const char *said)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return -1;
    if (!view->format || strcmp(view->format, "d") || view->len != count * (ptrdiff_t)sizeof(double))
        return fail(said);
    *vector = view->buf;
    return 0;
}

int read_state(double **state, PyObject *object, Py_buffer *view, ptrdiff_t count)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
        return -1;
    if (!view->format || strcmp(view->format, "d") || view->len != count * (ptrdiff_t)sizeof(double))
        return fail("scan: expected bases and sums as float64, one for each series");
    *state = view->buf;
    return 0;
}

/* The items of a tuple as planes of one shape, that of the first of all; None leaves its plane without data. */
int read_tuple(
    PyObject *tuple, Plane *planes, Py_buffer *views, int least, int most, int writable, ptrdiff_t shape[3])
{
    const Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : -1;
    if (count < least || count > most)
        return fail("moments: expected tuples of as many arrays as are needed");
    for (int k = 0; k < count; k++) {
        PyObject *item = PyTuple_GetItem(tuple, k);
        if (item == Py_None)
            continue;
        if (PyObject_GetBuffer(item, &views[k], PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0)
            return -1;
        if (shape[0] < 0 && views[k].ndim == 3)
            memcpy(shape, views[k].shape, 3 * sizeof *shape);
        if (read_plane(&planes[k], &views[k], shape[0], shape[1], shape[2]) < 0)
            return -1;
    }
    return (int)count;
}

int all_double(const Plane *planes, int count)
{
    for (int k = 0; k < count; k++)
        if (planes[k].data && planes[k].dtype != FLOAT64)
            return fail("moments: expected float64");
    return 0;
}

/* The planes of x and of what is to be written. */
int read_sweep(Sweep *sweep, PyObject *x, PyObject *const *outs, int count, Py_buffer *views)
{
    if (PyObject_GetBuffer(x, &views[0], PyBUF_STRIDES | PyBUF_FORMAT) < 0)
        return -1;
    if (views[0].ndim != 3)
        return fail("scan: expected x and out of one shape, (outer, n, inner)");
    const ptrdiff_t *shape = views[0].shape;
    sweep->outer = shape[0], sweep->n = shape[1], sweep->inner = shape[2];
    sweep->outs = count;
    if (read_plane(&sweep->x, &views[0], shape[0], shape[1], shape[2]) < 0)
        return -1;
    for (int k = 0; k < count; k++) {
        Py_buffer *view = &views[1 + k];
        if (PyObject_GetBuffer(outs[k], view, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) < 0
            || read_plane(&sweep->out[k], view, shape[0], shape[1], shape[2]) < 0
            || (!is_empty(sweep) && check_apart(&views[0], view) < 0))
            return -1;
    }
    return 0;
}

void release(Py_buffer *views, int count)
{
    for (int k = 0; k < count; k++)
        if (views[k].obj)
            PyBuffer_Release(&views[k]);
}
