/* The recurrence where each element loses another share: plain loops, columns side by side. */

#include "scan.h"

typedef struct {
    Plane u, lost, kept, out; /* `kept` without data where it is 1 - lost */
    ptrdiff_t outer, n, inner;
    double *sums;
    ptrdiff_t each; /* how many columns a part takes */
} Elements;

static void elements_part(void *work, size_t index)
{
    const Elements *elements = work;
    const ptrdiff_t strips = (elements->inner + elements->each - 1) / elements->each;
    const ptrdiff_t row = (ptrdiff_t)index / strips, begin = (ptrdiff_t)index % strips * elements->each;
    const ptrdiff_t end = elements->inner - begin < elements->each ? elements->inner : begin + elements->each;
    double *sums = elements->sums + row * elements->inner;
    for (ptrdiff_t t = 0; t < elements->n; t++) {
        const double *u = (const double *)element(&elements->u, row, t, 0);
        const double *lost = (const double *)element(&elements->lost, row, t, 0);
        const double *kept = elements->kept.data ? (const double *)element(&elements->kept, row, t, 0) : NULL;
        double *out = (double *)element(&elements->out, row, t, 0);
        for (ptrdiff_t i = begin; i < end; i++) {
            const double share = lost[i * elements->lost.step[2]], new = u[i * elements->u.step[2]], old = sums[i];
            const int most = kept && share > 0.5;
            sums[i] = most ? kept[i * elements->kept.step[2]] * old + new : old + (new - share * old);
            out[i * elements->out.step[2]] = sums[i];
        }
    }
}

static int read_elements(Elements *elements, PyObject *const objects[5], Py_buffer views[5])
{
    Plane *const planes[] = {&elements->u, &elements->lost, &elements->kept, &elements->out};
    for (int k = 0; k < 4; k++) {
        if (k == 2 && objects[k] == Py_None)
            continue;
        if (PyObject_GetBuffer(objects[k], &views[k], PyBUF_STRIDES | PyBUF_FORMAT | (k == 3 ? PyBUF_WRITABLE : 0)) < 0)
            return -1;
        if (k == 0) {
            if (views[0].ndim != 3)
                return fail("scan: expected arrays of one shape, (outer, n, inner)");
            elements->outer = views[0].shape[0];
            elements->n = views[0].shape[1];
            elements->inner = views[0].shape[2];
        }
        if (read_plane(planes[k], &views[k], elements->outer, elements->n, elements->inner) < 0)
            return -1;
        if (planes[k]->dtype != FLOAT64)
            return fail("scan: expected float64");
    }
    if (elements->outer && elements->n && elements->inner && check_apart(&views[0], &views[3]) < 0)
        return -1;
    return read_state(&elements->sums, objects[4], &views[4], elements->outer * elements->inner);
}

PyObject *py_scan_elements(PyObject *module, PyObject *arguments)
{
    PyObject *objects[5];
    Py_buffer views[5];
    Elements elements;
    int threads, read;
    memset(views, 0, sizeof views);
    memset(&elements, 0, sizeof elements);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOOi:scan_elements", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &threads))
        return NULL;
    read = read_elements(&elements, objects, views);
    if (read == 0 && elements.outer > 0 && elements.n > 0 && elements.inner > 0) {
        const ptrdiff_t strips = (threads + elements.outer - 1) / elements.outer;
        const ptrdiff_t wide = ((elements.inner + strips - 1) / strips + 7) / 8 * 8;
        elements.each = wide < STRIP ? wide : STRIP;
        const ptrdiff_t count = (elements.inner + elements.each - 1) / elements.each * elements.outer;
        Py_BEGIN_ALLOW_THREADS
        share(elements_part, &elements, (size_t)count, threads);
        Py_END_ALLOW_THREADS
    }
    release(views, 5);
    return read < 0 ? NULL : Py_NewRef(Py_None);
}
