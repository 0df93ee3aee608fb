/* Running means along time, of many series at once, in one pass over memory.

       S[t] = S[t-1] + (pre[t] * (x[t] - base) - lost * S[t-1])        out[t] = base + post[t] * S[t]

   All arithmetic is in float64. Two ways, by how a series lies in memory: lines, whose steps lie side by side, and
   strips of columns, whose neighbours do. Large work is shared by threads: series, strips; or, of few long series,
   segments of time, where each thread finds what it starts from by reading as much of the past as still counts. */

#include "scan.h"

#include <stdlib.h>

static void take(const Sweep *sweep, const Tile *tile, States *states)
{
    COLUMNS[chosen].mean(tile, states, sweep->pre ? sweep->pre + tile->time : NULL, &sweep->fading);
}

/* Where shares are given, they are those of each step. */
static int run(Sweep *sweep, int threads, const double *given)
{
    Shares *post = &sweep->post;
    const ptrdiff_t count = sweep->outer * sweep->inner;
    if (given) {
        post->table = given;
        post->known = post->settled = sweep->n;
    } else if (count > 1 && tabulate(post, sweep->n) < 0)
        return -1;
    sweep->around &= is_large(sweep);
    sweep->take = take;
    if (has_strips(sweep))
        in_strips(sweep, threads);
    else if (count < threads)
        in_segments(sweep, threads);
    else
        in_lines(sweep, threads);
    if (!given)
        free((double *)post->table);
    return 0;
}

/* A float, or a vector. */
static int read_factor(double *value, const double **vector, PyObject *object, Py_buffer *view, ptrdiff_t count)
{
    if (!PyFloat_Check(object))
        return read_vector(vector, object, view, count, "scan: expected a float, or one float64 for each step");
    *value = PyFloat_AsDouble(object);
    return 0;
}

/* Runs what was read without error. */
static int finish(Sweep *sweep, int read, int threads, const double *given)
{
    if (read == 0 && !is_empty(sweep)) {
        Py_BEGIN_ALLOW_THREADS
        read = run(sweep, threads, given);
        Py_END_ALLOW_THREADS
        if (read < 0)
            PyErr_NoMemory();
    }
    return read;
}

static PyObject *give(const Sweep *sweep, int read, Py_buffer *views, int count)
{
    release(views, count);
    return read < 0 ? NULL : PyBool_FromLong(sweep->unfit == 0);
}

PyObject *py_scan(PyObject *module, PyObject *arguments)
{
    enum { X, OUT, BASE, SUMS, PRE, POST, VIEWS };
    PyObject *objects[VIEWS];
    Py_buffer views[VIEWS];
    double lost, pre = 1.0, post = 1.0;
    const double *given = NULL;
    int threads, read, untouched = 0;
    Sweep sweep;
    memset(views, 0, sizeof views);
    memset(&sweep, 0, sizeof sweep);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOdOOi|p:scan", &objects[X], &objects[OUT], &objects[BASE], &objects[SUMS],
                          &lost, &objects[PRE], &objects[POST], &threads, &untouched))
        return NULL;
    sweep.around = !untouched;
    read = read_sweep(&sweep, objects[X], &objects[OUT], 1, views);
    const ptrdiff_t count = sweep.outer * sweep.inner;
    if (read == 0)
        read = read_state(&sweep.base, objects[BASE], &views[BASE], count) < 0
            || read_state(&sweep.sums, objects[SUMS], &views[SUMS], count) < 0
            || read_factor(&pre, &sweep.pre, objects[PRE], &views[PRE], sweep.n) < 0
            || read_factor(&post, &given, objects[POST], &views[POST], sweep.n) < 0 || read_lost(&sweep, lost) < 0
            ? -1 : 0;
    if (read == 0 && pre != 1.0 && (given || !(pre > 0.0)))
        read = fail("scan: expected pre as 1.0, above 0 where post is a float, or one float64 for each step");
    if (read == 0) {
        prepare_shares(&sweep.post, lost, 0.0, 0);
        for (int k = 0; k < BLOCK; k++)
            sweep.post.always[k] = pre * post; /* the sums are kept without */
        for (ptrdiff_t k = 0; k < count; k++)
            sweep.sums[k] /= pre;
    }
    read = finish(&sweep, read, threads, given);
    for (ptrdiff_t k = 0; read == 0 && k < count; k++)
        sweep.sums[k] *= pre;
    return give(&sweep, read, views, VIEWS);
}

PyObject *py_mean(PyObject *module, PyObject *arguments)
{
    enum { X, OUT, START, VIEWS };
    PyObject *objects[VIEWS];
    Py_buffer views[VIEWS];
    double lost;
    int threads, read, debias, untouched = 0;
    Sweep sweep;
    memset(views, 0, sizeof views);
    memset(&sweep, 0, sizeof sweep);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOddpi|p:mean", &objects[X], &objects[OUT], &objects[START], &sweep.held, &lost,
                          &debias, &threads, &untouched))
        return NULL;
    sweep.around = !untouched;
    read = read_sweep(&sweep, objects[X], &objects[OUT], 1, views);
    const size_t count = (size_t)(sweep.outer * sweep.inner);
    if (read == 0 && objects[START] != Py_None)
        read = read_vector(&sweep.start, objects[START], &views[START], (ptrdiff_t)count,
                           "mean: expected the start as float64, one for each series");
    if (read == 0)
        read = read_lost(&sweep, lost);
    double few[2], *state = count > 1 ? PyMem_Malloc(2 * count * sizeof(double)) : few;
    if (read == 0 && !state) {
        PyErr_NoMemory();
        read = -1;
    }
    if (read == 0)
        prepare_shares(&sweep.post, lost, sweep.held, debias);
    sweep.base = state;
    sweep.sums = state + count;
    sweep.fresh = 1;
    read = finish(&sweep, read, threads, NULL);
    if (state != few)
        PyMem_Free(state);
    return give(&sweep, read, views, VIEWS);
}
