/* How series begin: what they are carried relative to, and the sums before the first step. */

#include "scan.h"

/* Of how many values a series' size is told. */
enum { FEW = 16 };

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

/* The mean before the first step. */
double rise_from(const Sweep *sweep, double sum) { return sweep->held > 0.0 ? sum / sweep->held : 0.0; }

int is_fit(const Sweep *sweep, const State *state)
{
    return isfinite(state->sum) && isfinite(state->spread) && state->hidden <= 0.25 * (double)sweep->n;
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

void begin_strip(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, States *states)
{
    const ptrdiff_t series = row * sweep->inner + column;
    double *low = states->base, *high = states->sum;
    for (ptrdiff_t t = 0; t < sweep->n; t += apart(sweep))
        COLUMNS[chosen].extremes(low, high, element(&sweep->x, row, t, column), width, t == 0, sweep->x.dtype);
    for (int i = 0; i < width; i++) {
        const double first = read_double(element(&sweep->x, row, 0, column), i, sweep->x.dtype);
        low[i] = base_from(first, low[i], high[i]);
        high[i] = sum_from(sweep, series + i, first, low[i]);
        states->rise[i] = rise_from(sweep, high[i]);
    }
}
