/* Running means of series whose steps are taken one series at a time: whole, in turns, or in segments of time. */

#include "scan.h"

/* Segments at most; how many bits of the past count to who reads it up again. */
enum { SEGMENTS = 64, BITS = 64 };

/* The steps from `begin` to `end` of one series, from the sum before them; gives the sum after them. */
static double line(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, ptrdiff_t begin, ptrdiff_t end, double base, double sum,
    Stage *stage)
{
    const LineLoops *loops = &LINE[chosen];
    const Plane *x = &sweep->x, *out = &sweep->out[0];
    const ptrdiff_t step = out->step[1], size = (ptrdiff_t)size_of(out->dtype);
    const int at_once = x->dtype == out->dtype && x->dtype <= FLOAT64 && x->step[1] == 1 && step == 1 && !sweep->pre;
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
            sum = LINE[chosen].reach(from, n, base, sum, &sweep->fading, x->dtype);
        } else {
            LINE[chosen].read(u, from, (int)n, x->step[1], base, x->dtype);
            for (ptrdiff_t i = 0; i < n; i++)
                sum = sweep->fading.whole1 * sum
                    + ((sweep->pre ? sweep->pre[t + i] : 1.0) * u[i] - sweep->fading.lost1 * sum);
        }
        t += n;
    }
    return sum;
}

/* Where the steps of a series do not lie side by side, several take turns: the neighbours' lines are in the cache. */
static void some_lines(void *work, size_t index)
{
    Sweep *sweep = work;
    Stage stage;
    begin_stage(&stage);
    size_t unfit = 0;
    const ptrdiff_t n = sweep->n, step = sweep->x.step[1], count = sweep->outer * sweep->inner;
    const ptrdiff_t first = (ptrdiff_t)index * sweep->each;
    const ptrdiff_t last = count - first < sweep->each ? count : first + sweep->each;
    const ptrdiff_t turn = last - first == 1 || step == 1 || step == -1 ? n : BLOCK;
    for (ptrdiff_t t = 0; t < n; t += turn)
        for (ptrdiff_t series = first; series < last; series++) {
            const ptrdiff_t row = series / sweep->inner, column = series % sweep->inner;
            const ptrdiff_t end = n - t < turn ? n : t + turn;
            if (t == 0 && sweep->fresh)
                begin_line(sweep, row, column);
            const double sum = line(sweep, row, column, t, end, sweep->base[series], sweep->sums[series], &stage);
            sweep->sums[series] = sum;
            unfit += end == n && !isfinite(sum);
        }
    leave(&stage);
    end_around();
    if (unfit)
        ADD(&sweep->unfit, unfit);
}

void in_lines(Sweep *sweep, int threads)
{
    const ptrdiff_t count = sweep->outer * sweep->inner, step = sweep->x.step[1];
    const ptrdiff_t parts = threads > 1 && (step == 1 || step == -1) ? 8 * threads : threads;
    sweep->each = (count + parts - 1) / parts;
    share(some_lines, sweep, (size_t)((count + sweep->each - 1) / sweep->each), threads);
}

/* The steps of a segment, from the sum before them. */
static double segment(const Sweep *sweep, size_t index, double sum)
{
    const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
    const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
    const ptrdiff_t end = sweep->n - begin < sweep->each ? sweep->n : begin + sweep->each;
    Stage stage;
    begin_stage(&stage);
    sum = line(sweep, row, column, begin, end, sweep->base[sweep->series], sum, &stage);
    leave(&stage);
    end_around();
    return sum;
}

static void one_segment(void *work, size_t index)
{
    const Sweep *sweep = work;
    double sum = sweep->sums[sweep->series];
    if (index > 0) {
        const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
        const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
        const double counts = ceil(BITS * log(2.0) / -log1p(-sweep->post.lost));
        const ptrdiff_t back = counts < (double)begin ? (ptrdiff_t)counts : begin;
        sum = reach(sweep, row, column, begin - back, begin, sweep->base[sweep->series], back < begin ? 0.0 : sum);
    }
    sweep->begins[index] = sum;
    sweep->ends[index] = segment(sweep, index, sum);
}

/* One series after the other, each in as many segments as there are threads. What a segment began with was found by
   reading as far back as counts if the past was not much larger; where it was, the segment is done again. */
void in_segments(Sweep *sweep, int threads)
{
    double begins[SEGMENTS], ends[SEGMENTS];
    const ptrdiff_t most = threads < SEGMENTS ? threads : SEGMENTS, blocks = (sweep->n + BLOCK - 1) / BLOCK;
    sweep->each = (blocks + most - 1) / most * BLOCK;
    sweep->begins = begins;
    sweep->ends = ends;
    const size_t count = (size_t)((sweep->n + sweep->each - 1) / sweep->each);
    for (sweep->series = 0; sweep->series < sweep->outer * sweep->inner; sweep->series++) {
        double *sum = sweep->sums + sweep->series;
        if (sweep->fresh)
            begin_line(sweep, sweep->series / sweep->inner, sweep->series % sweep->inner);
        share(one_segment, sweep, count, threads);
        *sum = ends[0];
        for (size_t index = 1; index < count && isfinite(*sum); index++)
            *sum = fabs(begins[index] - *sum) <= fabs(*sum) * 0x1p-40 ? ends[index] : segment(sweep, index, *sum);
        sweep->unfit += !isfinite(*sum);
    }
}
