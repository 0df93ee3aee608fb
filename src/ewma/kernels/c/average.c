/* Running means and second moments by what the steps weigh (weigh.c):

       d = x - mean        mean += share * d        spread += share * (kept * d * d - spread)        kept = 1 - share

   A share near 1 is taken from the other end, `mean = x - kept * d`, so that what is forgotten leaves nothing. */

#include "steps.h"

enum { PAIRS = 3 };

static const double NEAR = 0.9;

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
    Walk x[SERIES], out[SERIES], spread[PAIRS];
    Walk share = walk(&a->share, row, column), kept = walk(&a->kept, row, column);
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

PyObject *py_average(PyObject *module, PyObject *arguments)
{
    PyObject *xs, *shares, *means, *spreads, *state;
    Py_buffer views[VIEWS], which;
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
    int read = a.series = read_tuple(xs, a.x, views, 1, SERIES, 0, shape);
    if (read >= 0)
        read = read_tuple(shares, share, views + 2, 2, 2, 0, shape);
    if (read >= 0)
        read = read_tuple(means, a.mean, views + 4, a.series, a.series, 1, shape);
    if (read >= 0)
        read = a.pairs = read_tuple(spreads, a.spread, views + 6, 0, PAIRS, 1, shape);
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
        read = read_state(&numbers, state, &views[VIEWS - 1], (4 * a.series + a.pairs) * count);
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
    release(views, VIEWS);
    PyBuffer_Release(&which);
    if (read < 0)
        return NULL;
    return Py_BuildValue("(OOd)", a.finite ? Py_True : Py_False, a.missed ? Py_True : Py_False, hidden);
}
