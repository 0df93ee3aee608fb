/* Running means and second moments whose steps differ: by their times, by a profile, by what is missing.

   Two passes, so that what many series have in common is computed once. The first goes from how much each step keeps and
   brings to what it weighs (the rules are those of weighting.py); the second averages:

       d = x - mean        mean += share * d        spread += share * (kept * d * d - spread)        kept = 1 - share

   A share near 1 is taken from the other end, `mean = x - kept * d`, so that what is forgotten leaves nothing. */

#include "scan.h"

enum { SERIES = 2, PAIRS = 3 };

static const double NEAR = 0.9;

/* One series of a plane, from step to step. */
typedef struct {
    char *at;
    ptrdiff_t step;
} Walk;

INLINE Walk walk(const Plane *plane, ptrdiff_t row, ptrdiff_t column)
{
    return plane->data ? (Walk){element(plane, row, 0, column), plane->step[1] * (ptrdiff_t)size_of(plane->dtype)}
                       : (Walk){NULL, 0};
}

INLINE double next(Walk *walk, Dtype dtype)
{
    const double x = read_double(walk->at, 0, dtype);
    walk->at += walk->step;
    return x;
}

INLINE void put(Walk *walk, double x)
{
    *(double *)walk->at = x;
    walk->at += walk->step;
}

/* What the steps weigh. */

enum { KEEP, LOST, GAIN, PASSED, TERMS };
enum { SHARE, KEPT, WEIGHT, PAIR, COUNT, RESULTS };

typedef struct {
    Plane x[SERIES], term[TERMS], result[RESULTS];
    ptrdiff_t outer, n, inner;
    int series, debias, decays, propagates, timed;
    double *state[5]; /* of each series, as in State */
} Weighing;

/* Of one series: `gone` is what gaps have taken of a weight of 1. */
typedef struct {
    double weight, gone, pairs, count, seen;
} State;

INLINE double carry(double what, double keep, double lost, double gain)
{
    return lost > 0.5 ? keep * what + gain : what + (gain - lost * what);
}

/* What one step weighs. */
INLINE void weigh(
    State *s, int observed, double keep, double lost, double gain, double *share, double *kept, const int debias,
    const int decays, const int timed)
{
    const double before = s->weight;
    if (!observed && !decays)
        keep = 1.0, lost = 0.0;
    const double past = keep * before;
    if (debias) {
        gain = observed ? gain : 0.0;
        s->weight = carry(before, keep, lost, gain);
        s->pairs = carry(s->pairs, keep * keep, lost * (2.0 - lost), 2.0 * past * gain);
        *share = s->weight != 0.0 ? gain / s->weight : observed; /* nothing has weight yet: the newest is all there is */
        *kept = s->weight != 0.0 ? past / s->weight : past;
        return;
    }
    const double whole = timed ? 1.0 : before + (gain - lost * before);
    *share = !observed ? 0.0 : timed ? s->gone + lost * before : gain / whole;
    *kept = !observed ? 1.0 : past / whole;
    s->weight = observed ? 1.0 : carry(before, keep, lost, 0.0);
    s->gone = observed ? 0.0 : carry(s->gone, keep, lost, lost);
    s->pairs = carry(s->pairs, *kept * *kept, *share * (2.0 - *share), 2.0 * *kept * *share);
}

INLINE void weigh_series(
    const Weighing *w, ptrdiff_t row, ptrdiff_t column, const int debias, const int series)
{
    const ptrdiff_t place = row * w->inner + column;
    double *const *state = w->state;
    State s = {state[0][place], state[1][place], state[2][place], state[3][place], state[4][place]};
    Walk x[SERIES], term[TERMS], result[RESULTS];
    for (int k = 0; k < series; k++)
        x[k] = walk(&w->x[k], row, column);
    for (int k = 0; k < TERMS; k++)
        term[k] = walk(&w->term[k], row, column);
    for (int k = 0; k < RESULTS; k++)
        result[k] = walk(&w->result[k], row, column);
    for (ptrdiff_t t = 0; t < w->n; t++) {
        int observed = 1;
        for (int k = 0; k < series; k++)
            observed &= isfinite(next(&x[k], w->x[k].dtype)) != 0;
        const double keep = next(&term[KEEP], FLOAT64), lost = next(&term[LOST], FLOAT64);
        const double gain = next(&term[GAIN], FLOAT64), passed = next(&term[PASSED], FLOAT64);
        double share, kept;
        weigh(&s, observed, keep, lost, gain, &share, &kept, debias, w->decays, w->timed);
        s.count = !observed && w->propagates ? NAN : s.count + observed;
        s.seen += observed || w->decays ? passed : 0.0;
        put(&result[SHARE], share);
        put(&result[KEPT], kept);
        put(&result[WEIGHT], s.weight);
        put(&result[PAIR], s.pairs);
        put(&result[COUNT], s.count);
    }
    state[0][place] = s.weight, state[1][place] = s.gone, state[2][place] = s.pairs;
    state[3][place] = s.count, state[4][place] = s.seen;
}

static void weigh_all(const Weighing *w)
{
    for (ptrdiff_t row = 0; row < w->outer; row++)
        for (ptrdiff_t column = 0; column < w->inner; column++)
            if (w->debias && w->series == 1)
                weigh_series(w, row, column, 1, 1);
            else
                weigh_series(w, row, column, w->debias, w->series);
}

/* Averages. */

typedef struct {
    Plane x[SERIES], share, kept, mean[SERIES], spread[PAIRS];
    ptrdiff_t outer, n, inner;
    int series, pairs, first[PAIRS], second[PAIRS], exact;
    /* Of each series: what x is taken relative to, and so the mean, which has a rest that is too small for it where
       `exact`; how many values the mean hides; the spreads. */
    double *base[SERIES], *at[SERIES], *rest[SERIES], *hidden[SERIES], *spreads[PAIRS];
    int finite, missed; /* whether all that came out is finite; whether a value was not */
} Averaging;

/* A running mean, relative to a base. */
typedef struct {
    double base, at, rest, hidden;
    int missed;
} Mean;

/* a + b, and what that leaves out (Knuth). */
INLINE double sum_of(double a, double b, double *left_out)
{
    const double total = a + b, back = total - a;
    *left_out = (a - (total - back)) + (b - back);
    return total;
}

/* Takes in x; gives its distance from the mean before it. A share of 0 leaves out whatever x is. */
INLINE double take(Mean *mean, double x, double share, double kept, const int exact)
{
    const double u = x - mean->base, far = exact ? (u - mean->at) - mean->rest : u - mean->at;
    const double d = share == 0.0 ? 0.0 : far, end = share > NEAR ? u : mean->at;
    const double change = share > NEAR ? -kept * d : share * d;
    mean->missed |= !(u - u == 0.0);
    if (exact) {
        double left_out;
        mean->at = sum_of(end, change, &left_out);
        mean->rest = share > NEAR ? left_out : mean->rest + left_out;
    } else
        mean->at = end + change;
    mean->hidden += HIDDEN * fabs(d) < fabs(mean->at);
    return d;
}

INLINE void average_series(
    Averaging *a, ptrdiff_t row, ptrdiff_t column, const int series, const int pairs, const int exact)
{
    const ptrdiff_t place = row * a->inner + column;
    Walk x[SERIES], out[SERIES], spread[PAIRS], share = walk(&a->share, row, column), kept = walk(&a->kept, row, column);
    Mean mean[SERIES];
    double spreads[PAIRS], distance[SERIES];
    for (int k = 0; k < series; k++) {
        x[k] = walk(&a->x[k], row, column), out[k] = walk(&a->mean[k], row, column);
        mean[k] = (Mean){a->base[k][place], a->at[k][place], a->rest[k][place], 0.0, 0};
    }
    for (int k = 0; k < pairs; k++)
        spread[k] = walk(&a->spread[k], row, column), spreads[k] = a->spreads[k][place];
    for (ptrdiff_t t = 0; t < a->n; t++) {
        const double c = next(&share, FLOAT64), left = next(&kept, FLOAT64);
        for (int k = 0; k < series; k++) {
            distance[k] = take(&mean[k], next(&x[k], a->x[k].dtype), c, left, exact);
            put(&out[k], mean[k].base + (exact ? mean[k].at + mean[k].rest : mean[k].at));
        }
        for (int k = 0; k < pairs; k++) {
            const double new = left * (pairs == 1 ? distance[0] * distance[series - 1]
                                                  : distance[a->first[k]] * distance[a->second[k]]);
            spreads[k] = c > NEAR ? left * spreads[k] + c * new : spreads[k] + c * (new - spreads[k]);
            put(&spread[k], spreads[k]);
        }
    }
    for (int k = 0; k < series; k++) {
        a->at[k][place] = mean[k].at, a->rest[k][place] = mean[k].rest, a->hidden[k][place] = mean[k].hidden;
        a->finite &= isfinite(mean[k].at) != 0;
        a->missed |= mean[k].missed;
    }
    for (int k = 0; k < pairs; k++) {
        a->spreads[k][place] = spreads[k];
        a->finite &= isfinite(spreads[k]) != 0;
    }
}

static void average_all(Averaging *a)
{
    a->finite = 1;
    for (ptrdiff_t row = 0; row < a->outer; row++)
        for (ptrdiff_t column = 0; column < a->inner; column++)
            if (a->exact || a->series > 1)
                average_series(a, row, column, a->series, a->pairs, a->exact);
            else if (a->pairs)
                average_series(a, row, column, 1, 1, 0);
            else
                average_series(a, row, column, 1, 0, 0);
}

/* What Python sees. */

enum { MOST = 12 };

/* The items of a tuple as planes of one shape, that of the first of all; None leaves its plane without data. */
static int read_planes(
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

static int all_double(const Plane *planes, int count)
{
    for (int k = 0; k < count; k++)
        if (planes[k].data && planes[k].dtype != FLOAT64)
            return fail("moments: expected float64");
    return 0;
}

PyObject *py_weigh(PyObject *module, PyObject *arguments)
{
    PyObject *xs, *terms, *results, *state;
    Py_buffer views[MOST];
    Weighing w;
    double *numbers = NULL;
    ptrdiff_t shape[3] = {-1, -1, -1};
    memset(views, 0, sizeof views);
    memset(&w, 0, sizeof w);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOpppp:weigh", &xs, &terms, &results, &state, &w.debias, &w.decays,
                          &w.propagates, &w.timed))
        return NULL;
    int read = read_planes(results, w.result, views, RESULTS, RESULTS, 1, shape);
    for (int k = 0; read >= 0 && k < RESULTS; k++)
        if (!w.result[k].data)
            read = fail("moments: expected arrays; got None");
    if (read >= 0)
        read = read_planes(terms, w.term, views + RESULTS, TERMS, TERMS, 0, shape);
    if (read >= 0)
        read = w.series = read_planes(xs, w.x, views + RESULTS + TERMS, 0, SERIES, 0, shape);
    const ptrdiff_t count = shape[0] * shape[2];
    if (read >= 0 && (all_double(w.term, TERMS) < 0 || all_double(w.result, RESULTS) < 0))
        read = -1;
    if (read >= 0)
        read = read_state(&numbers, state, &views[MOST - 1], 5 * count);
    if (read >= 0 && shape[0] && shape[1] && shape[2]) {
        w.outer = shape[0], w.n = shape[1], w.inner = shape[2];
        for (int k = 0; k < 5; k++)
            w.state[k] = numbers + k * count;
        Py_BEGIN_ALLOW_THREADS
        weigh_all(&w);
        Py_END_ALLOW_THREADS
    }
    release(views, MOST);
    return read < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *py_average(PyObject *module, PyObject *arguments)
{
    PyObject *xs, *shares, *means, *spreads, *state;
    Py_buffer views[MOST], which;
    Averaging a;
    Plane share[2];
    double *numbers = NULL;
    ptrdiff_t shape[3] = {-1, -1, -1};
    memset(views, 0, sizeof views);
    memset(&a, 0, sizeof a);
    memset(share, 0, sizeof share);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOy*Op:average", &xs, &shares, &means, &spreads, &which, &state, &a.exact))
        return NULL;
    int read = a.series = read_planes(xs, a.x, views, 1, SERIES, 0, shape);
    if (read >= 0)
        read = read_planes(shares, share, views + 2, 2, 2, 0, shape);
    if (read >= 0)
        read = read_planes(means, a.mean, views + 4, a.series, a.series, 1, shape);
    if (read >= 0)
        read = a.pairs = read_planes(spreads, a.spread, views + 6, 0, PAIRS, 1, shape);
    const ptrdiff_t count = shape[0] * shape[2];
    if (read >= 0 && (all_double(share, 2) < 0 || all_double(a.mean, SERIES) < 0 || all_double(a.spread, PAIRS) < 0))
        read = -1;
    for (int k = 0; read >= 0 && k < 2; k++)
        if (!share[k].data || (k < a.series && !(a.x[k].data && a.mean[k].data)))
            read = fail("moments: expected arrays; got None");
    if (read >= 0 && which.len != 2 * a.pairs)
        read = fail("moments: expected two numbers for each spread");
    for (int k = 0; read >= 0 && k < a.pairs; k++) {
        a.first[k] = ((const unsigned char *)which.buf)[2 * k];
        a.second[k] = ((const unsigned char *)which.buf)[2 * k + 1];
        if (!a.spread[k].data || a.first[k] >= a.series || a.second[k] >= a.series)
            read = fail("moments: expected spreads of the given series");
    }
    if (read >= 0)
        read = read_state(&numbers, state, &views[MOST - 1], (4 * a.series + a.pairs) * count);
    a.finite = 1;
    double hidden = 0.0;
    if (read >= 0 && shape[0] && shape[1] && shape[2]) {
        a.outer = shape[0], a.n = shape[1], a.inner = shape[2];
        a.share = share[0], a.kept = share[1];
        for (int k = 0; k < a.series; k++) {
            a.base[k] = numbers + 4 * k * count, a.at[k] = a.base[k] + count;
            a.rest[k] = a.at[k] + count, a.hidden[k] = a.rest[k] + count;
        }
        for (int k = 0; k < a.pairs; k++)
            a.spreads[k] = numbers + (4 * a.series + k) * count;
        Py_BEGIN_ALLOW_THREADS
        average_all(&a);
        Py_END_ALLOW_THREADS
        for (ptrdiff_t place = 0; place < a.series * count; place++)
            hidden = fmax(hidden, a.hidden[place / count][place % count] / (double)a.n);
    }
    release(views, MOST);
    PyBuffer_Release(&which);
    return read < 0 ? NULL : Py_BuildValue("(OOd)", a.finite ? Py_True : Py_False, a.missed ? Py_True : Py_False, hidden);
}
