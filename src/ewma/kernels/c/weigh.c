/* What steps weigh that differ: by their times, by a profile, by what is missing; by the rules of weighting.py. */

#include "steps.h"

enum { KEEP, LOST, GAIN, PASSED, TERMS };
enum { SHARE, KEPT, WEIGHT, PAIR, COUNT, RESULTS };

typedef struct {
    Plane x[SERIES], term[TERMS], result[RESULTS];
    ptrdiff_t outer, n, inner;
    int series, debias, decays, propagates, timed;
    double *state[5]; /* of each series, as in Weights */
} Weighing;

/* Of one series: `gone` is what gaps have taken of a weight of 1. */
typedef struct {
    double weight, gone, pairs, count, seen;
} Weights;

INLINE double carry(double what, double keep, double lost, double gain)
{
    return lost > 0.5 ? keep * what + gain : what + (gain - lost * what);
}

/* What one step weighs. */
INLINE void weigh(
    Weights *s, int observed, double keep, double lost, double gain, double *share, double *kept, const int debias,
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
        /* While nothing has weight, the newest is all there is. */
        *share = s->weight != 0.0 ? gain / s->weight : observed;
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
    Weights s = {state[0][place], state[1][place], state[2][place], state[3][place], state[4][place]};
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

PyObject *py_weigh(PyObject *module, PyObject *arguments)
{
    PyObject *xs, *terms, *results, *state;
    Py_buffer views[VIEWS];
    Weighing w;
    double *numbers = NULL;
    ptrdiff_t shape[3] = {-1, -1, -1};
    memset(views, 0, sizeof views);
    memset(&w, 0, sizeof w);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOpppp:weigh", &xs, &terms, &results, &state, &w.debias, &w.decays,
                          &w.propagates, &w.timed))
        return NULL;
    int read = read_tuple(results, w.result, views, RESULTS, RESULTS, 1, shape);
    for (int k = 0; read >= 0 && k < RESULTS; k++)
        if (!w.result[k].data)
            read = fail("moments: expected arrays; got None");
    if (read >= 0)
        read = read_tuple(terms, w.term, views + RESULTS, TERMS, TERMS, 0, shape);
    if (read >= 0)
        read = w.series = read_tuple(xs, w.x, views + RESULTS + TERMS, 0, SERIES, 0, shape);
    const ptrdiff_t count = shape[0] * shape[2];
    if (read >= 0 && (all_double(w.term, TERMS) < 0 || all_double(w.result, RESULTS) < 0))
        read = -1;
    if (read >= 0)
        read = read_state(&numbers, state, &views[VIEWS - 1], 5 * count);
    if (read >= 0 && shape[0] && shape[1] && shape[2]) {
        w.outer = shape[0], w.n = shape[1], w.inner = shape[2];
        for (int k = 0; k < 5; k++)
            w.state[k] = numbers + k * count;
        Py_BEGIN_ALLOW_THREADS
        weigh_all(&w);
        Py_END_ALLOW_THREADS
    }
    release(views, VIEWS);
    return read < 0 ? NULL : Py_NewRef(Py_None);
}
