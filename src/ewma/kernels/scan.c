/* Running means along time, of many series at once, in one pass over memory.

       S[t] = S[t-1] + (pre[t] * (x[t] - base) - lost * S[t-1])        out[t] = base + post[t] * S[t]

   All arithmetic is in float64. Two ways, by how a series lies in memory: lines, whose steps lie side by side, and strips
   of columns, whose neighbours do (scan_loops.c). Large work is shared by threads: series, strips; or, of few long
   series, segments of time, where each thread finds what it starts from by reading as much of the past as still counts. */

#include "scan.h"

#include <stdlib.h>

#ifdef MANY_INSTRUCTION_SETS
#include <immintrin.h>
#endif

/* Columns of a strip, where there are many, and where there are few; steps whose shares are kept for all series; of how many values a series'
   size is told; bytes of a result from which on it goes around the caches; elements from which on threads are worth
   waking; how many bits of the past count to who reads it up again. */
enum { STRIP = 4096, NARROW = 64, TABLE = 1 << 16, FEW = 16, AROUND = 1 << 24, LARGE = 1 << 20, BITS = 64 };

INLINE int direct(const Plane *one, const Plane *other) { return one->dtype == other->dtype && one->dtype <= FLOAT64; }

/* Shares. */

void prepare_shares(Shares *shares, double lost, double held, int debias)
{
    const double rate = log1p(-lost);
    shares->rate = rate;
    shares->lost = lost;
    shares->held = held;
    shares->keep = exp(WINDOW * rate);
    shares->ramp[0] = 0.0;
    for (int k = 1; k <= WINDOW; k++)
        shares->ramp[k] = lost == 0.0 ? k : lost >= 1.0 || k == 1 ? 1.0 : -expm1(k * rate) / lost;
    shares->settled = PTRDIFF_MAX;
    if (!debias || lost >= 1.0 || fabs(1.0 - lost * held) <= 0x1p-53)
        shares->settled = 0;
    else if (lost > 0.0)
        shares->settled = (ptrdiff_t)fmin(ceil(54.0 * log(2.0) / -rate), 0x1p62);
    for (int k = 0; k < BLOCK; k++)
        shares->always[k] = lost;
}

/* The shares of the n steps after t, in whole windows. */
void ramp(const Shares *shares, ptrdiff_t t, int n, double *to)
{
    const double gone = (double)t * shares->rate, left = exp(gone);
    const double ramped = shares->lost == 0.0 ? (double)t : -expm1(gone) / shares->lost;
    LOOPS[chosen].shares(to, n, ramped + left * shares->held, left * (1.0 - shares->lost * shares->held), shares->ramp,
                         shares->keep);
}

/* The shares of the n steps after t, at most a block of them; in `room`, where they are not there yet. */
const double *shares_of(const Shares *shares, ptrdiff_t t, int n, double *room)
{
    if (t >= shares->settled)
        return shares->always;
    if (t + n <= shares->known)
        return shares->table + t;
    ramp(shares, t, n, room);
    return room;
}

/* How series begin. */

static double first_of(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column)
{
    return read_double(element(&sweep->x, row, 0, column), 0, sweep->x.dtype);
}

/* A series is carried relative to its first value, where all are of one size: a constant comes to 0 then, and a large
   offset to what it varies by, without rounding, no value being more than twice another. Otherwise relative to 0, since
   a single spike would take the digits of all the values that follow. */
INLINE double base_from(double first, double low, double high)
{
    return (low > 0.0 && high <= 2.0 * low) || (high < 0.0 && 2.0 * high <= low) ? first : 0.0;
}

INLINE double sum_from(const Sweep *sweep, ptrdiff_t series, double first, double base)
{
    return sweep->held == 0.0 ? 0.0 : sweep->held * ((sweep->start ? sweep->start[series] : first) - base);
}

static ptrdiff_t apart(const Sweep *sweep) { return (sweep->n + FEW - 1) / FEW; }

void begin_line(Sweep *sweep, ptrdiff_t row, ptrdiff_t column)
{
    const ptrdiff_t series = row * sweep->inner + column, step = sweep->x.step[1] * apart(sweep);
    const Dtype dtype = sweep->x.dtype;
    const char *from = element(&sweep->x, row, 0, column);
    const double first = read_double(from, 0, dtype);
    double low = first, high = first;
    for (ptrdiff_t t = 0; t < sweep->n; t += apart(sweep), from += step * (ptrdiff_t)size_of(dtype)) {
        const double x = read_double(from, 0, dtype);
        low = x < low ? x : low; /* a NaN is told by the sums */
        high = x > high ? x : high;
    }
    sweep->base[series] = base_from(first, low, high);
    sweep->sums[series] = sum_from(sweep, series, first, sweep->base[series]);
}

static void begin_strip(Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width)
{
    const ptrdiff_t series = row * sweep->inner + column;
    double *low = sweep->base + series, *high = sweep->sums + series;
    for (ptrdiff_t t = 0; t < sweep->n; t += apart(sweep))
        LOOPS[chosen].extremes(low, high, element(&sweep->x, row, t, column), width, t == 0, sweep->x.dtype);
    for (int i = 0; i < width; i++) {
        const double first = first_of(sweep, row, column + i);
        low[i] = base_from(first, low[i], high[i]);
        high[i] = sum_from(sweep, series + i, first, low[i]);
    }
}

/* Results that are to go around the caches, kept together until they are whole lines of the cache. */

typedef struct {
    char *to;
    size_t size;
    double room[BLOCK];
} Stage;

/* To clear the room would cost a short series as much as its steps. */
INLINE void begin_stage(Stage *stage)
{
    stage->to = NULL;
    stage->size = 0;
}

static void leave(Stage *stage)
{
    if (stage->size)
        LOOPS[chosen].copy(stage->to, (char *)stage->room, stage->size);
    stage->size = 0;
}

/* Where to write `size` bytes, at most a block of doubles, that belong to `to`. */
static char *enter(Stage *stage, char *to, size_t size)
{
    if (stage->to + stage->size != to || stage->size + size > sizeof stage->room) {
        leave(stage);
        stage->to = to;
    }
    stage->size += size;
    return (char *)stage->room + stage->size - size;
}

/* Lines. */

/* The steps from `begin` to `end` of one series, from the sum before them; gives the sum after them. */
static double line(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, ptrdiff_t begin, ptrdiff_t end, double base, double sum,
    Stage *stage)
{
    const Loops *loops = &LOOPS[chosen];
    const Plane *x = &sweep->x, *out = &sweep->out;
    const ptrdiff_t step = out->step[1], size = (ptrdiff_t)size_of(out->dtype);
    const int at_once = direct(x, out) && x->step[1] == 1 && step == 1 && !sweep->pre;
    double u[BLOCK], y[BLOCK], shares[BLOCK];
    for (ptrdiff_t t = begin; t < end; t += BLOCK) {
        const int n = end - t < BLOCK ? (int)(end - t) : BLOCK, whole = at_once ? n / WINDOW * WINDOW : 0;
        const char *from = element(x, row, t, column);
        const double *post = shares_of(&sweep->post, t, n, shares);
        char *to = element(out, row, t, column);
        if (sweep->around && step == 1)
            to = enter(stage, to, (size_t)(n * size));
        else if (sweep->around && step == -1)
            to = enter(stage, to - (n - 1) * size, (size_t)(n * size)) + (n - 1) * size;
        if (whole)
            sum = loops->line(to, from, whole, base, sum, post, &sweep->fading, x->dtype);
        if (whole < n) {
            const int rest = n - whole, padded = (rest + WINDOW - 1) / WINDOW * WINDOW;
            from += whole * x->step[1] * (ptrdiff_t)size_of(x->dtype);
            loops->read(u, from, rest, x->step[1], base, x->dtype);
            for (int i = 0; sweep->pre && i < rest; i++)
                u[i] *= sweep->pre[t + whole + i];
            for (int i = rest; i < padded; i++)
                u[i] = 0.0;
            sum = loops->line((char *)y, (char *)u, padded, 0.0, sum, NULL, &sweep->fading, FLOAT64);
            sum = isfinite(sum) ? y[rest - 1] : sum;
            loops->write(to + whole * step * size, y, rest, step, base, post + whole, out->dtype);
        }
    }
    return sum;
}

/* The sum before step `end`, from as much of the past as counts, which is `begins` as of step `begin`. */
static double reach(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, ptrdiff_t begin, ptrdiff_t end, double base, double sum)
{
    const Plane *x = &sweep->x;
    const int at_once = x->dtype <= FLOAT64 && x->step[1] == 1 && !sweep->pre;
    double u[BLOCK];
    for (ptrdiff_t t = begin; t < end;) {
        ptrdiff_t n = end - t < BLOCK ? end - t : BLOCK;
        const char *from = element(x, row, t, column);
        if (at_once && end - t >= WINDOW) {
            n = (end - t) / WINDOW * WINDOW;
            sum = LOOPS[chosen].reach(from, n, base, sum, &sweep->fading, x->dtype);
        } else {
            LOOPS[chosen].read(u, from, (int)n, x->step[1], base, x->dtype);
            for (ptrdiff_t i = 0; i < n; i++)
                sum = sweep->fading.whole1 * sum
                    + ((sweep->pre ? sweep->pre[t + i] : 1.0) * u[i] - sweep->fading.lost1 * sum);
        }
        t += n;
    }
    return sum;
}

/* Where the steps of a series do not lie side by side, several take turns: the neighbours' lines are in the cache. */
static size_t lines(Sweep *sweep, ptrdiff_t first, ptrdiff_t last)
{
    Stage stage;
    begin_stage(&stage);
    size_t unfinished = 0;
    const ptrdiff_t step = sweep->x.step[1];
    const ptrdiff_t turn = last - first == 1 || step == 1 || step == -1 ? sweep->n : BLOCK;
    for (ptrdiff_t t = 0; t < sweep->n; t += turn)
        for (ptrdiff_t series = first; series < last; series++) {
            const ptrdiff_t row = series / sweep->inner, column = series % sweep->inner;
            const ptrdiff_t end = sweep->n - t < turn ? sweep->n : t + turn;
            if (t == 0 && sweep->fresh)
                begin_line(sweep, row, column);
            const double sum = line(sweep, row, column, t, end, sweep->base[series], sweep->sums[series], &stage);
            sweep->sums[series] = sum;
            unfinished += end == sweep->n && !isfinite(sum);
        }
    leave(&stage);
    return unfinished;
}

/* Segments of one series. */

static void segment(const Sweep *sweep, size_t index)
{
    const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
    const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
    const ptrdiff_t end = sweep->n - begin < sweep->each ? sweep->n : begin + sweep->each;
    const double base = sweep->base[sweep->series];
    double sum = sweep->sums[sweep->series];
    Stage stage;
    begin_stage(&stage);
    if (begin > 0) {
        const double counts = ceil(BITS * log(2.0) / -log1p(-sweep->post.lost));
        const ptrdiff_t back = counts < (double)begin ? (ptrdiff_t)counts : begin;
        sum = reach(sweep, row, column, begin - back, begin, base, back < begin ? 0.0 : sum);
    }
    sweep->begins[index] = sum;
    sweep->ends[index] = line(sweep, row, column, begin, end, base, sum, &stage);
    leave(&stage);
}

/* Columns. */

/* Few columns go through all steps of a block in registers; of many, whose rows are far apart, one row after the other.
   What is not of one dtype goes through float64. */
static void strip_steps(Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width)
{
    enum { PIECE = 512 };
    const Loops *loops = &LOOPS[chosen];
    const Plane *x = &sweep->x, *out = &sweep->out;
    const ptrdiff_t series = row * sweep->inner + column;
    double *base = sweep->base + series, *sums = sweep->sums + series, shares[BLOCK];
    double u[PIECE], y[PIECE];
    Stage stage;
    begin_stage(&stage);
    const int at_once = direct(x, out), narrow = at_once && width <= NARROW;
    const ptrdiff_t x_step = x->step[1] * (ptrdiff_t)size_of(x->dtype);
    const ptrdiff_t out_step = out->step[1] * (ptrdiff_t)size_of(out->dtype);
    for (ptrdiff_t t = 0; t < sweep->n; t += BLOCK) {
        const int steps = sweep->n - t < BLOCK ? (int)(sweep->n - t) : BLOCK;
        const double *post = shares_of(&sweep->post, t, steps, shares), *pre = sweep->pre ? sweep->pre + t : NULL;
        if (narrow) {
            loops->columns(element(out, row, t, column), element(x, row, t, column), out_step, x_step,
                           16, steps, width, sums, base, pre, post, &sweep->fading, x->dtype);
            continue;
        }
        for (int i = 0; i < steps; i++)
            for (int k = 0; k < width; k += PIECE) {
                const int n = width - k < PIECE ? width - k : PIECE;
                const char *from = element(x, row, t + i, column + k);
                char *to = element(out, row, t + i, column + k);
                const double *before = pre ? pre + i : NULL;
                if (sweep->around)
                    to = enter(&stage, to, (size_t)n * size_of(out->dtype));
                if (at_once)
                    loops->columns(to, from, sweep->around ? 0 : out_step, x_step, 1, 1, n, sums + k, base + k, before,
                                   post + i, &sweep->fading, x->dtype);
                else {
                    loops->read(u, from, n, 1, 0.0, x->dtype);
                    loops->columns((char *)y, (char *)u, 0, 0, 0, 1, n, sums + k, base + k, before, post + i,
                                   &sweep->fading, FLOAT64);
                    loops->write(to, y, n, 1, 0.0, NULL, out->dtype);
                }
            }
    }
    leave(&stage);
}

static size_t strip(Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width)
{
    const double *sums = sweep->sums + row * sweep->inner + column;
    size_t unfinished = 0;
    if (sweep->fresh)
        begin_strip(sweep, row, column, width);
    strip_steps(sweep, row, column, width);
    for (int i = 0; i < width; i++)
        unfinished += !isfinite(sums[i]);
    return unfinished;
}

/* One part of the work. */

static void sweep_part(void *work, size_t index)
{
    Sweep *sweep = work;
    size_t unfinished = 0;
    const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
    if (sweep->way == SEGMENTS)
        segment(sweep, index);
    else if (sweep->way == LINES) {
        const ptrdiff_t count = sweep->outer * sweep->inner;
        unfinished = lines(sweep, begin, count - begin < sweep->each ? count : begin + sweep->each);
    } else {
        const ptrdiff_t strips = (sweep->inner + sweep->each - 1) / sweep->each;
        const ptrdiff_t row = (ptrdiff_t)index / strips, column = (ptrdiff_t)index % strips * sweep->each;
        const ptrdiff_t width = sweep->inner - column < sweep->each ? sweep->inner - column : sweep->each;
        unfinished = strip(sweep, row, column, (int)width);
    }
    if (unfinished)
        ADD(&sweep->unfinished, unfinished);
#ifdef MANY_INSTRUCTION_SETS
    if (sweep->around)
        _mm_sfence();
#endif
}

/* One series after the other, each in as many segments as there are threads. What a segment began with was found by
   reading as far back as counts if the past was not much larger; where it was, the segment is done again. */
static void in_segments(Sweep *sweep, int threads)
{
    double begins[64], ends[64];
    const ptrdiff_t most = threads < 64 ? threads : 64, blocks = (sweep->n + BLOCK - 1) / BLOCK;
    sweep->way = SEGMENTS;
    sweep->each = (blocks + most - 1) / most * BLOCK;
    sweep->begins = begins;
    sweep->ends = ends;
    const size_t count = (size_t)((sweep->n + sweep->each - 1) / sweep->each);
    for (sweep->series = 0; sweep->series < sweep->outer * sweep->inner; sweep->series++) {
        double *sum = sweep->sums + sweep->series;
        if (sweep->fresh)
            begin_line(sweep, sweep->series / sweep->inner, sweep->series % sweep->inner);
        share(sweep_part, sweep, count, threads);
        *sum = ends[0];
        for (size_t index = 1; index < count && isfinite(*sum); index++) {
            if (fabs(begins[index] - *sum) <= fabs(*sum) * 0x1p-40)
                *sum = ends[index];
            else {
                const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
                const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
                const ptrdiff_t end = sweep->n - begin < sweep->each ? sweep->n : begin + sweep->each;
                Stage stage;
                begin_stage(&stage);
                *sum = line(sweep, row, column, begin, end, sweep->base[sweep->series], *sum, &stage);
                leave(&stage);
            }
        }
        sweep->unfinished += !isfinite(*sum);
    }
}

static void run(Sweep *sweep, int threads)
{
    const ptrdiff_t count = sweep->outer * sweep->inner, x_step = sweep->x.step[2], step = sweep->x.step[1];
    const int large = (double)count * (double)sweep->n >= LARGE;
    threads = large && threads > 1 ? threads : 1;
    if ((double)count * (double)sweep->n * (double)size_of(sweep->out.dtype) < AROUND)
        sweep->around = 0;
    const int columns = sweep->inner >= (direct(&sweep->x, &sweep->out) ? 8 : 32) && x_step == 1
        && sweep->out.step[2] == 1 && step != 1 && step != -1;
    if (columns) {
        const ptrdiff_t wanted = (threads + sweep->outer - 1) / sweep->outer;
        const ptrdiff_t wide = ((sweep->inner + wanted - 1) / wanted + 15) / 16 * 16; /* whole cache lines */
        sweep->way = STRIPS;
        const ptrdiff_t most = sweep->inner <= 4 * NARROW ? NARROW : STRIP;
        sweep->each = wide < most ? wide : most;
        share(sweep_part, sweep, (size_t)((sweep->inner + sweep->each - 1) / sweep->each * sweep->outer), threads);
    } else if (count < threads) {
        in_segments(sweep, threads);
    } else {
        const ptrdiff_t share_of_each = (count + 8 * threads - 1) / (8 * threads);
        sweep->way = LINES;
        sweep->each = threads == 1 || (step != 1 && step != -1) ? (count + threads - 1) / threads : share_of_each;
        share(sweep_part, sweep, (size_t)((count + sweep->each - 1) / sweep->each), threads);
    }
}

/* With what is known before the first step: shares that are the same for many series, or that are given. */
static int run_with_table(Sweep *sweep, int threads, const double *given)
{
    Shares *post = &sweep->post;
    double *table = NULL;
    if (given) {
        post->table = given;
        post->known = post->settled = sweep->n;
    } else if (post->settled > 0 && sweep->outer * sweep->inner > 1) {
        const ptrdiff_t most = post->settled < sweep->n ? post->settled : sweep->n;
        post->known = ((most < TABLE ? most : TABLE) + BLOCK - 1) / BLOCK * BLOCK;
        post->table = table = malloc((size_t)post->known * sizeof(double));
        if (!table)
            return -1;
        for (ptrdiff_t t = 0; t < post->known; t += BLOCK)
            ramp(post, t, BLOCK, table + t);
    }
    run(sweep, threads);
    free(table);
    return 0;
}

/* Where each element loses another share: plain loops, columns side by side. */

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

/* What Python sees; _native.pyi says what it is for. */

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

/* A float, or a vector. */
static int read_factor(double *value, const double **vector, PyObject *object, Py_buffer *view, ptrdiff_t count)
{
    if (!PyFloat_Check(object))
        return read_vector(vector, object, view, count, "scan: expected a float, or one float64 for each step");
    *value = PyFloat_AsDouble(object);
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

static void prepare_fading(Fading *fading, double lost)
{
    const double rate = log1p(-lost);
    fading->keep[0] = 1.0;
    for (int k = 1; k <= WINDOW; k++)
        fading->keep[k] = exp(k * rate);
    fading->lost = -expm1(WINDOW * rate);
    fading->whole = fading->lost <= 0.5;
    fading->lost = fading->whole ? fading->lost : -fading->keep[WINDOW];
    fading->whole1 = lost <= 0.5;
    fading->lost1 = fading->whole1 ? lost : lost - 1.0;
}

static int read_planes(Sweep *sweep, PyObject *x, PyObject *out, Py_buffer views[2])
{
    if (PyObject_GetBuffer(x, &views[0], PyBUF_STRIDES | PyBUF_FORMAT) < 0
        || PyObject_GetBuffer(out, &views[1], PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
        return -1;
    if (views[0].ndim != 3)
        return fail("scan: expected x and out of one shape, (outer, n, inner)");
    sweep->outer = views[0].shape[0];
    sweep->n = views[0].shape[1];
    sweep->inner = views[0].shape[2];
    if (read_plane(&sweep->x, &views[0], sweep->outer, sweep->n, sweep->inner) < 0 || read_plane(&sweep->out, &views[1], sweep->outer, sweep->n, sweep->inner) < 0)
        return -1;
    return sweep->outer && sweep->n && sweep->inner ? check_apart(&views[0], &views[1]) : 0;
}

int read_lost(Sweep *sweep, double lost)
{
    if (!(lost >= 0.0 && lost <= 1.0))
        return fail("scan: expected lost from 0 to 1");
    prepare_fading(&sweep->fading, lost);
    return 0;
}

void release(Py_buffer *views, int count)
{
    for (int k = 0; k < count; k++)
        if (views[k].obj)
            PyBuffer_Release(&views[k]);
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

/* Runs what was read without error. */
static int finish(Sweep *sweep, int read, int threads, const double *given)
{
    if (read == 0 && sweep->outer > 0 && sweep->n > 0 && sweep->inner > 0) {
        Py_BEGIN_ALLOW_THREADS
        read = run_with_table(sweep, threads, given);
        Py_END_ALLOW_THREADS
        if (read < 0)
            PyErr_NoMemory();
    }
    return read;
}

static PyObject *give(const Sweep *sweep, int read, Py_buffer *views, int count)
{
    release(views, count);
    return read < 0 ? NULL : PyBool_FromLong(sweep->unfinished == 0);
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
    if (!PyArg_ParseTuple(arguments, "OOOOdOOi|p:scan", &objects[X], &objects[OUT], &objects[BASE], &objects[SUMS], &lost,
                          &objects[PRE], &objects[POST], &threads, &untouched))
        return NULL;
    sweep.around = !untouched;
    read = read_planes(&sweep, objects[X], objects[OUT], views);
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
    read = read_planes(&sweep, objects[X], objects[OUT], views);
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
