/* The update `average += c * (value - average)` for a list of tensors, in one pass over memory.

   Each block of values (blocks.h) is averaged into each of K sets while it is in the nearest cache. native.py prepares
   a table of pointers once; nothing here knows of tensors.

   A filter of gradients is the same update, after which each block of values, still in the cache, becomes
   `raw * value + slow * average`; where a second set is given, it averages the values' squares. */

#include "blocks.h"

/* How many elements are averaged into one set before the next, and how many a thread takes at a time. */
enum { BLOCK = 256, PART = 1 << 17 };

/* One tensor: where its value lies, how many elements it has, the stream of its random bits, how many elements come
   before it in the list; and where its average lies in each set. */
typedef struct {
    uint64_t value, size, stream, before, averages[];
} Row;

/* The elements from `start` to `stop` of all tensors one after the other. Gives how many values stayed out. */
INLINE size_t lerp_range(
    const Update *update, uint64_t start, uint64_t stop, const Dtype average_dtype, const Dtype value_dtype)
{
    const size_t width = sizeof(Row) / sizeof(uint64_t) + update->sets;
    size_t low = 0, high = update->count, skipped = 0;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (((const Row *)(update->rows + middle * width))->before <= start)
            low = middle;
        else
            high = middle;
    }
    for (size_t index = low; index < update->count && start < stop; index++) {
        const Row *row = (const Row *)(update->rows + index * width);
        while (start < stop && start - row->before < row->size) {
            const uint64_t first = start - row->before;
            uint64_t n = row->size - first < stop - start ? row->size - first : stop - start;
            n = n < BLOCK ? n : BLOCK;
            void *values = (char *)(uintptr_t)row->value + first * size_of(value_dtype);
            PREFETCH((char *)values + n * size_of(value_dtype), n * size_of(value_dtype));
            for (size_t k = 0; k < (update->filters ? 1 : update->sets); k++) {
                const Set *set = &update->set[k];
                void *averages = (char *)(uintptr_t)row->averages[k] + first * size_of(average_dtype);
                PREFETCH((char *)averages + n * size_of(average_dtype), n * size_of(average_dtype));
                const uint32_t offset = set->word + (uint32_t)row->stream + (uint32_t)first * GOLDEN;
                if (lerp_block(averages, values, (int)n, set, offset, average_dtype, value_dtype)) {
                    const size_t out = carefully(averages, values, (int)n, set, offset, update);
                    skipped += k == 0 ? out : 0;
                }
            }
            if (update->filters) {
                const uint64_t offset = first * size_of(average_dtype);
                if (update->sets > 1)
                    square_block((char *)(uintptr_t)row->averages[1] + offset, values, (int)n,
                                 update->set[0].coefficient, update->guard, average_dtype, value_dtype);
                if (update->raw != 1.0 || update->slow != 0.0)
                    filter_block(values, (char *)(uintptr_t)row->averages[0] + offset, (int)n, update, average_dtype,
                             value_dtype);
            }
            start += n;
        }
    }
    return skipped;
}

/* One copy of the loops for each pair of dtypes: in each the dtypes are constants. */

#define BY_VALUE(average)                                                          \
    switch (update->value_dtype) {                                                 \
    case FLOAT32: return lerp_range(update, start, stop, average, FLOAT32);        \
    case FLOAT64: return lerp_range(update, start, stop, average, FLOAT64);        \
    case BFLOAT16: return lerp_range(update, start, stop, average, BFLOAT16);      \
    default: return lerp_range(update, start, stop, average, FLOAT16);             \
    }

INLINE size_t lerp_dtypes(const Update *update, uint64_t start, uint64_t stop)
{
    switch (update->average_dtype) {
    case FLOAT32: BY_VALUE(FLOAT32)
    case FLOAT64: BY_VALUE(FLOAT64)
    case BFLOAT16: BY_VALUE(BFLOAT16)
    default: BY_VALUE(FLOAT16)
    }
}

/* And one copy of all these for each instruction set. */

typedef size_t Lerp(const Update *update, uint64_t start, uint64_t stop);

#define COMPILE(version, TARGET)                                                             \
    TARGET static size_t lerp_##version(const Update *update, uint64_t start, uint64_t stop) \
    {                                                                                        \
        return lerp_dtypes(update, start, stop);                                             \
    }
EACH_VERSION(COMPILE)

#define OF(version) lerp_##version
static Lerp *const LERP[VERSION_COUNT] = OF_EACH_VERSION(OF);

/* Large work is cut into parts, which threads share. */

typedef struct {
    const Update *update;
    uint64_t start, stop;
    size_t skipped;
} Work;

static void lerp_part(void *shared, size_t index)
{
    Work *work = shared;
    const uint64_t start = work->start + index * PART, left = work->stop - start;
    const size_t skipped = LERP[chosen](work->update, start, left < PART ? work->stop : start + PART);
    if (skipped)
        ADD(&work->skipped, skipped);
}

static size_t lerp_together(const Update *update, uint64_t start, uint64_t stop, int threads)
{
    if (threads < 2 || stop - start <= PART)
        return LERP[chosen](update, start, stop);
    Work work = {update, start, stop, 0};
    share(lerp_part, &work, (size_t)((stop - start + PART - 1) / PART), threads);
    return work.skipped;
}

/* What Python sees; _native.pyi says what it is for. */

enum { HEADER = 4 };

static int read_set(Set *set, PyObject *coefficients, PyObject *words, Py_ssize_t k)
{
    PyObject *coefficient = PySequence_GetItem(coefficients, k), *word = PySequence_GetItem(words, k);
    if (coefficient && word) {
        set->coefficient = PyFloat_AsDouble(coefficient);
        set->rounded = word != Py_None;
        if (set->rounded && !PyErr_Occurred())
            set->word = (uint32_t)PyLong_AsUnsignedLongLongMask(word);
    }
    Py_XDECREF(coefficient);
    Py_XDECREF(word);
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *py_lerp(PyObject *module, PyObject *arguments)
{
    Py_buffer table;
    PyObject *coefficients, *words, *result = NULL;
    int threads;
    unsigned long long start = 0, stop = UINT64_MAX;
    double raw = NAN, slow = NAN;
    if (!PyArg_ParseTuple(arguments, "y*OOi|KKdd:lerp", &table, &coefficients, &words, &threads, &start, &stop, &raw,
                          &slow))
        return NULL;
    const uint64_t *header = table.buf;
    const size_t length = (size_t)table.len / sizeof(uint64_t);
    const size_t sets = length >= HEADER ? (size_t)header[0] : 0, width = sizeof(Row) / sizeof(uint64_t) + sets;
    Update *update = NULL;
    if (sets == 0 || (length - HEADER) % width || header[1] > FLOAT16 || header[2] > FLOAT16) {
        PyErr_SetString(PyExc_ValueError, "this is no table of _native.lerp");
        goto done;
    }
    if (PySequence_Size(coefficients) != (Py_ssize_t)sets || PySequence_Size(words) != (Py_ssize_t)sets) {
        PyErr_Format(PyExc_ValueError, "expected %zu coefficients and %zu words, one for each set", sets, sets);
        goto done;
    }
    update = PyMem_Malloc(sizeof(Update) + sets * sizeof(Set));
    if (!update) {
        PyErr_NoMemory();
        goto done;
    }
    update->rows = header + HEADER;
    update->count = (length - HEADER) / width;
    update->sets = sets;
    update->value_dtype = (Dtype)header[1];
    update->average_dtype = (Dtype)header[2];
    update->guard = header[3] != 0;
    update->filters = !isnan(raw);
    update->raw = raw;
    update->slow = slow;
    for (size_t k = 0; k < sets; k++) {
        if (read_set(&update->set[k], coefficients, words, (Py_ssize_t)k) < 0)
            goto done;
        if (update->set[k].rounded && update->average_dtype == FLOAT64) {
            PyErr_SetString(PyExc_ValueError, "float64 averages are rounded to nearest; expected None for their word");
            goto done;
        }
    }
    if (update->count) {
        const Row *last = (const Row *)(update->rows + (update->count - 1) * width);
        stop = stop < last->before + last->size ? stop : last->before + last->size;
        size_t skipped = 0;
        if (start < stop) {
            Py_BEGIN_ALLOW_THREADS
            skipped = lerp_together(update, start, stop, threads);
            Py_END_ALLOW_THREADS
        }
        result = PyLong_FromSize_t(skipped);
    }
    else
        result = PyLong_FromLong(0);
done:
    PyMem_Free(update);
    PyBuffer_Release(&table);
    return result;
}
