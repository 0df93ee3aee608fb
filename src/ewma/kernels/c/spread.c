/* Running variances, deviations and bands around the mean, of whole series whose steps are alike and all observed.

       d = x - mean before      Q[t] = Q[t-1] + (kept[t] * d * d - lost * Q[t-1])      variance[t] = factor[t] * Q[t]

   Lines and strips are those of the mean. Biased, the factor is the share of the newest value; unbiased it is W / D, of
   the weight W = 1 / share and the weight D of all pairs, in closed form:

       debiased: (1 + k) / 2k / W[t - 1]
       otherwise: (1 - k ** 2) / 2k / (1 - k ** 2m), m steps since the weight was 1 */

#include "scan.h"

#include <stdlib.h>

enum { MOST = 64, TOGETHER = 64 };

typedef struct {
    Sweep sweep;
    int kind, unbiased, late; /* late: the first step has no pair yet */
    double k, scale;
    Shares factor;
    ptrdiff_t row, column;
    State begins[MOST], ends[MOST];
} Spreading;

/* What spreads are multiplied by after each of the n steps after t, but for `scale`; room has one more. */
static const double *factors(const Spreading *s, ptrdiff_t t, int n, double *room)
{
    const ptrdiff_t before = t - s->late;
    if (before >= 0)
        return shares_of(&s->factor, before, n, room);
    ramp(&s->factor, 0, n, room + 1);
    room[0] = NAN;
    return room;
}

static void write_block(
    const Spreading *s, ptrdiff_t row, ptrdiff_t column, ptrdiff_t t, int n, const double *rises, double *spreads,
    const double *factor)
{
    const LineLoops *loops = &LINE[chosen];
    const double base = s->kind == BANDS ? s->sweep.base[row * s->sweep.inner + column] : 0.0;
    double edge[BLOCK];
    loops->widths(spreads, n, factor, s->scale, s->kind != VARIANCE);
    for (int k = 0; k < s->sweep.outs; k++) {
        const Plane *out = &s->sweep.out[k];
        const double *made = s->kind != BANDS ? spreads : k == 1 ? rises : edge;
        if (made == edge)
            loops->edges(edge, rises, spreads, n, s->k * (k - 1));
        loops->write(element(out, row, t, column), made, n, out->step[1], base, NULL, out->dtype);
    }
}

static void steps(
    const Spreading *s, ptrdiff_t row, ptrdiff_t column, ptrdiff_t begin, ptrdiff_t end, State *state, int writes)
{
    const Plane *x = &s->sweep.x;
    const double base = s->sweep.base[row * s->sweep.inner + column];
    double u[BLOCK], rises[BLOCK], spreads[BLOCK], shares[BLOCK], room[BLOCK + WINDOW + 1];
    for (ptrdiff_t t = begin; t < end; t += BLOCK) {
        const int n = end - t < BLOCK ? (int)(end - t) : BLOCK, padded = (n + WINDOW - 1) / WINDOW * WINDOW;
        const double *post = shares_of(&s->sweep.post, t, n, shares);
        LINE[chosen].read(u, element(x, row, t, column), n, x->step[1], base, x->dtype);
        for (int i = n; i < padded; i++)
            u[i] = 0.0;
        LINE[chosen].spread(rises, spreads, u, padded, post, &s->sweep.fading, state);
        if (writes)
            write_block(s, row, column, t, n, rises, spreads, s->unbiased ? factors(s, t, n, room) : post);
    }
}

static void take(const Sweep *sweep, const Tile *tile, States *states)
{
    const Spreading *s = (const Spreading *)sweep;
    double room[BLOCK + WINDOW + 1];
    const double *factor = s->unbiased ? factors(s, tile->time, tile->steps, room) : tile->post;
    COLUMNS[chosen].spread(tile, states, factor, s->scale, s->kind, s->k, &sweep->fading);
}

static State first_state(Spreading *s, ptrdiff_t row, ptrdiff_t column)
{
    begin_line(&s->sweep, row, column);
    const double sum = s->sweep.sums[row * s->sweep.inner + column];
    return (State){sum, rise_from(&s->sweep, sum), 0.0, 0.0};
}

/* Where the steps of a series do not lie side by side, several take turns: the neighbours' lines are in the cache. */
static void some_lines(void *work, size_t index)
{
    Spreading *s = work;
    const ptrdiff_t step = s->sweep.x.step[1], n = s->sweep.n, inner = s->sweep.inner;
    const ptrdiff_t count = s->sweep.outer * inner, first = (ptrdiff_t)index * s->sweep.each;
    const ptrdiff_t last = count - first < s->sweep.each ? count : first + s->sweep.each;
    const ptrdiff_t turn = step == 1 || step == -1 ? n : BLOCK, together = turn < n ? TOGETHER : 1;
    for (ptrdiff_t group = first; group < last; group += together) {
        State states[TOGETHER];
        const ptrdiff_t size = last - group < together ? last - group : together;
        for (ptrdiff_t t = 0; t < n; t += turn)
            for (ptrdiff_t k = 0; k < size; k++) {
                const ptrdiff_t row = (group + k) / inner, column = (group + k) % inner;
                if (t == 0)
                    states[k] = first_state(s, row, column);
                steps(s, row, column, t, n - t < turn ? n : t + turn, &states[k], 1);
            }
        for (ptrdiff_t k = 0; k < size; k++)
            if (!is_fit(&s->sweep, &states[k]))
                ADD(&s->sweep.unfit, 1);
    }
}

/* A segment begins from as much of the past as still counts, twice over: for the mean, from there for the spread. */
static void one_segment(void *work, size_t index)
{
    Spreading *s = work;
    const ptrdiff_t begin = (ptrdiff_t)index * s->sweep.each;
    const ptrdiff_t end = s->sweep.n - begin < s->sweep.each ? s->sweep.n : begin + s->sweep.each;
    State state = s->begins[0];
    if (begin > 0) {
        const double counts = ceil(128.0 * log(2.0) / -log1p(-s->sweep.post.lost) / BLOCK) * BLOCK;
        const ptrdiff_t back = counts < (double)begin ? (ptrdiff_t)counts : begin;
        if (back < begin)
            state = (State){0.0, 0.0, 0.0, 0.0};
        steps(s, s->row, s->column, begin - back, begin, &state, 0);
        state.hidden = 0.0;
        s->begins[index] = state;
    }
    steps(s, s->row, s->column, begin, end, &state, 1);
    s->ends[index] = state;
}

static int same(double one, double other) { return fabs(one - other) <= fabs(other) * 0x1p-40; }

static void segments(Spreading *s, int threads)
{
    const ptrdiff_t most = threads < MOST ? threads : MOST, blocks = (s->sweep.n + BLOCK - 1) / BLOCK;
    s->sweep.each = (blocks + most - 1) / most * BLOCK;
    const size_t count = (size_t)((s->sweep.n + s->sweep.each - 1) / s->sweep.each);
    for (s->row = 0; s->row < s->sweep.outer; s->row++)
        for (s->column = 0; s->column < s->sweep.inner; s->column++) {
            double hidden = 0.0;
            s->begins[0] = first_state(s, s->row, s->column);
            share(one_segment, s, count, threads);
            for (size_t index = 0; index < count; index++) {
                const State *before = &s->ends[index - (index > 0)], *begun = &s->begins[index];
                if (index > 0 && !(same(begun->sum, before->sum) && same(begun->spread, before->spread))
                    && isfinite(before->sum)) {
                    State state = *before;
                    const ptrdiff_t begin = (ptrdiff_t)index * s->sweep.each;
                    const ptrdiff_t left = s->sweep.n - begin;
                    const ptrdiff_t end = left < s->sweep.each ? s->sweep.n : begin + s->sweep.each;
                    state.hidden = 0.0;
                    steps(s, s->row, s->column, begin, end, &state, 1);
                    s->ends[index] = state;
                }
                hidden += s->ends[index].hidden;
            }
            s->ends[count - 1].hidden = hidden;
            for (size_t index = 0; index < count; index++)
                if (!is_fit(&s->sweep, &s->ends[index])) {
                    s->sweep.unfit++;
                    break;
                }
        }
}

static int run(Spreading *s, int threads)
{
    Sweep *sweep = &s->sweep;
    const ptrdiff_t count = sweep->outer * sweep->inner;
    double *state = malloc((size_t)(2 * count) * sizeof *state);
    if (!state || (count > 1 && (tabulate(&sweep->post, sweep->n) < 0 || tabulate(&s->factor, sweep->n) < 0))) {
        free(state);
        free((double *)sweep->post.table);
        return -1;
    }
    sweep->base = state;
    sweep->sums = state + count;
    sweep->fresh = 1;
    sweep->around = 0; /* results are new memory, which the system clears in the caches */
    sweep->take = take;
    if (has_strips(sweep))
        in_strips(sweep, threads);
    else if (count < threads)
        segments(s, threads);
    else {
        sweep->each = (count + threads - 1) / threads;
        share(some_lines, s, (size_t)((count + sweep->each - 1) / sweep->each), threads);
    }
    free(state);
    free((double *)sweep->post.table);
    free((double *)s->factor.table);
    return 0;
}

/* What Python sees. */

enum { X, FIRST_OUT, START = FIRST_OUT + OUTS, VIEWS };

static int read_arguments(Spreading *s, PyObject *x, PyObject *outs, PyObject *start, Py_buffer views[VIEWS])
{
    Sweep *sweep = &s->sweep;
    PyObject *items[OUTS];
    const int count = s->kind == BANDS ? OUTS : 1;
    if (s->kind < VARIANCE || s->kind > BANDS || PyTuple_Size(outs) != count)
        return fail("spread: expected one array to write, or three for bands");
    for (int k = 0; k < count; k++)
        items[k] = PyTuple_GetItem(outs, k);
    if (read_sweep(sweep, x, items, count, views) < 0)
        return -1;
    if (start == Py_None)
        return 0;
    return read_vector(&sweep->start, start, &views[START], sweep->outer * sweep->inner,
                       "spread: expected the start as float64, one for each series");
}

PyObject *py_spread(PyObject *module, PyObject *arguments)
{
    PyObject *x, *outs, *start;
    Py_buffer views[VIEWS];
    double lost, keep;
    int debias, threads, read = -1;
    Spreading *s = PyMem_Calloc(1, sizeof *s);
    memset(views, 0, sizeof views);
    (void)module;
    if (!s)
        return PyErr_NoMemory();
    if (PyArg_ParseTuple(arguments, "OO!Odddpidpi:spread", &x, &PyTuple_Type, &outs, &start, &s->sweep.held, &lost,
                         &keep, &debias, &s->kind, &s->k, &s->unbiased, &threads)
        && read_arguments(s, x, outs, start, views) == 0 && read_lost(&s->sweep, lost) == 0)
        read = keep > 0.0 ? 0 : fail("spread: expected a step to keep something");
    if (read == 0 && !is_empty(&s->sweep)) {
        prepare_shares(&s->sweep.post, lost, s->sweep.held, debias);
        prepare_shares(&s->factor, debias ? lost : lost * (2.0 - lost), 0.0, 1);
        s->scale = !s->unbiased ? 1.0 : (debias ? 1.0 + keep : 1.0) / (2.0 * keep);
        s->late = debias || start == Py_None;
        Py_BEGIN_ALLOW_THREADS
        read = run(s, threads);
        Py_END_ALLOW_THREADS
        if (read < 0)
            PyErr_NoMemory();
    }
    const int fit = s->sweep.unfit == 0;
    release(views, VIEWS);
    PyMem_Free(s);
    return read < 0 ? NULL : PyBool_FromLong(fit);
}
