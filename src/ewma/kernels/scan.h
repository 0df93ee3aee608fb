/* The scan along time: what the ways through the series (scan.c) and the loops over numbers (scan_loops.c) share. */

#ifndef EWMA_SCAN_H
#define EWMA_SCAN_H

#include "native.h"

/* Steps of a block (not a power of two: what lies 4096 bytes apart is in the processor's way) and of a window. */
enum { BLOCK = 1008, WINDOW = 16 };

typedef struct {
    char *data;
    Dtype dtype;
    ptrdiff_t step[3]; /* in elements, along (outer, n, inner) */
} Plane;

INLINE char *element(const Plane *plane, ptrdiff_t row, ptrdiff_t time, ptrdiff_t column)
{
    const ptrdiff_t place = row * plane->step[0] + time * plane->step[1] + column * plane->step[2];
    return plane->data + place * (ptrdiff_t)size_of(plane->dtype);
}

/* Of what Python gives; each -1 with an error set where it is not as expected. */
int fail(const char *what);
int read_plane(Plane *plane, const Py_buffer *view, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t inner);
int read_state(double **state, PyObject *object, Py_buffer *view, ptrdiff_t count);
void release(Py_buffer *views, int count);

/* How windows fade: `keep[k]` is what is left after k steps, and of a whole window `whole * S - lost * S`, of one step
   `whole1 * S - lost1 * S`: `whole` is 0 or 1, whichever is more precise. */
typedef struct {
    double keep[WINDOW + 1], whole, lost, whole1, lost1;
} Fading;

/* What each sum is multiplied by. Of a debiased mean that is 1 / weight, from step to step:

       weight[t] = (1 - kept ** t) / lost + kept ** t * held

   The first `known` are in a table; `settled` is when it has become one number. */
typedef struct {
    double rate, lost, held, ramp[WINDOW + 1], keep;
    const double *table;
    ptrdiff_t known, settled;
    double always[BLOCK];
} Shares;

typedef enum { LINES, STRIPS, SEGMENTS } Way;

typedef struct {
    Plane x, out;
    ptrdiff_t outer, n, inner;
    double *base, *sums; /* of each series */
    const double *pre;   /* of each step; or NULL */
    Shares post;
    Fading fading;
    int fresh;           /* bases and sums are to be found: each base from the values' size, each sum ... */
    const double *start; /* ... from the mean before the first step, or NULL where that is the first value ... */
    double held;         /* ... and what it weighs, in steps */
    int around;          /* whether large results go around the caches: not where their memory was never touched, which
                            the system clears in the caches when it is */
    Way way;
    ptrdiff_t each, series; /* how much a part takes: series, columns, steps; of which series, where these are steps */
    double *begins, *ends;  /* S before and after each segment */
    size_t unfinished;      /* how many series did not stay finite */
} Sweep;

/* In scan.c. */
void prepare_shares(Shares *shares, double lost, double held, int debias);
void ramp(const Shares *shares, ptrdiff_t t, int n, double *to);
const double *shares_of(const Shares *shares, ptrdiff_t t, int n, double *room);
void begin_line(Sweep *sweep, ptrdiff_t row, ptrdiff_t column);
int check_apart(const Py_buffer *x, const Py_buffer *out);
int read_vector(const double **vector, PyObject *object, Py_buffer *view, ptrdiff_t count, const char *said);
int read_lost(Sweep *sweep, double lost);

/* A running mean relative to a base, and its spread: sums as they fade, the mean itself; and how many values so far were
   that many times nearer to the mean than it is large, which hides them. */
typedef struct {
    double sum, rise, spread, hidden;
} Spread;

static const double HIDDEN = 1e3; /* as in residues.py */

/* Of each instruction set. Places are of elements whose neighbours lie side by side. */
typedef struct {
    /* Converts n elements to u = x - base, `step` elements apart; and y to base + post * y, or y where
       post is NULL. */
    void (*read)(double *u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype);
    void (*write)(char *to, const double *y, int n, ptrdiff_t step, double base, const double *post, Dtype dtype);
    /* Steps of a line in whole windows: from the sum before them to the sum after them. float32 or float64; where post is
       NULL, sums of float64. */
    double (*line)(
        char *to, const char *from, int n, double base, double sum, const double *post, const Fading *fading,
        Dtype dtype);
    /* The mean after each step of a line, and the spread before it is divided by the weight; whole windows. */
    void (*spread)(
        double *rises, double *spreads, const double *u, int n, const double *post, const Fading *fading, Spread *state);
    /* Variances, or their roots. */
    void (*spread_results)(double *to, const double *spreads, int n, const double *factor, int root);
    /* A line without writing anything. */
    double (*reach)(const char *from, ptrdiff_t n, double base, double sum, const Fading *fading, Dtype dtype);
    /* So many steps, `to_step` and `from_step` bytes apart, of n columns; those `soon` steps on are fetched. `pre` may be
       NULL. float32 or float64. */
    void (*columns)(
        char *to, const char *from, ptrdiff_t to_step, ptrdiff_t from_step, int soon, int steps, int n,
        double *sums, const double *base, const double *pre, const double *post, const Fading *fading, Dtype dtype);
    /* The smallest and the largest so far, of n columns; begins with the first where `begins`. */
    void (*extremes)(double *low, double *high, const char *from, int n, int begins, Dtype dtype);
    /* The shares of n steps, in whole windows: `1 / (weight + left * ramp[k])` after k steps; see Shares in scan.c. */
    void (*shares)(double *to, int n, double weight, double left, const double *ramp, double keep);
    /* Copies around the caches. */
    void (*copy)(char *to, const char *from, size_t size);
} Loops;

extern const Loops LOOPS[VERSION_COUNT];

#endif
