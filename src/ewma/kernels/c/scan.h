/* The scan along time: what its ways through the series and its loops over numbers share. */

#ifndef EWMA_SCAN_H
#define EWMA_SCAN_H

#include "native.h"

/* Steps of a block (not a power of two: what lies 4096 bytes apart is in the processor's way) and of a window;
   columns of a strip, of a tile, and results, at most. */
enum { BLOCK = 1008, WINDOW = 16, STRIP = 1024, WIDE = 256, OUTS = 3 };

/* Asks for what is read soon: the processor's own guesses come too late for loops as long as these. */
INLINE void fetch(const char *from, int size)
{
#if defined(__GNUC__)
    for (int k = 0; k < size; k += 64)
        __builtin_prefetch(from + k);
#endif
}

/* One case for each dtype, which is a constant in it. */
#define BY_DTYPE(dtype, CALL)                                                                                      \
    switch (dtype) {                                                                                               \
    case FLOAT32: CALL(FLOAT32); break;                                                                            \
    case FLOAT64: CALL(FLOAT64); break;                                                                            \
    case BFLOAT16: CALL(BFLOAT16); break;                                                                          \
    default: CALL(FLOAT16);                                                                                        \
    }

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

/* What is carried from step to step, of one series: a sum that fades, of a mean relative to a base; and of its spread
   another, the mean itself, and how many values so far were that many times nearer to the mean than it is large, which
   hides them. */
typedef struct {
    double sum, rise, spread, hidden;
} State;

/* The same of a strip of columns, whose bases are found with them. */
typedef struct {
    double base[STRIP], sum[STRIP], rise[STRIP], spread[STRIP], hidden[STRIP];
} States;

static const double HIDDEN = 1e3; /* as in residues.py */

/* Some steps of some columns of a strip, in their own dtype or as float64. */
typedef struct {
    ptrdiff_t time;
    int column, steps, width, soon; /* the first; how many; those `soon` steps on are fetched */
    const char *from;
    char *to[OUTS];
    ptrdiff_t from_step, to_step[OUTS]; /* in bytes */
    int around;
    const double *post;
    Dtype dtype;
} Tile;

typedef struct Sweep {
    Plane x, out[OUTS];
    int outs;
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
    ptrdiff_t each;      /* how much a part takes: series, columns, steps; ... */
    ptrdiff_t series;    /* ... of which series, where these are steps */
    double *begins, *ends; /* S before and after each segment */
    void (*take)(const struct Sweep *sweep, const Tile *tile, States *states);
    size_t unfit;        /* how many series did not stay finite, or were hidden by their means */
} Sweep;

INLINE int is_empty(const Sweep *sweep) { return !(sweep->outer && sweep->n && sweep->inner); }

typedef enum { VARIANCE, DEVIATION, BANDS } Kind;

/* planes.c: each -1 with an error set where something is not as expected. A view is to be released where it has an
   object. */
int fail(const char *what);
int read_plane(Plane *plane, const Py_buffer *view, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t inner);
int read_sweep(Sweep *sweep, PyObject *x, PyObject *const *outs, int count, Py_buffer *views);
int read_tuple(
    PyObject *tuple, Plane *planes, Py_buffer *views, int least, int most, int writable, ptrdiff_t shape[3]);
int read_vector(const double **vector, PyObject *object, Py_buffer *view, ptrdiff_t count, const char *said);
int read_state(double **state, PyObject *object, Py_buffer *view, ptrdiff_t count);
int all_double(const Plane *planes, int count);
int check_apart(const Py_buffer *x, const Py_buffer *out);
void release(Py_buffer *views, int count);

/* shares.c */
int read_lost(Sweep *sweep, double lost);
void prepare_shares(Shares *shares, double lost, double held, int debias);
int tabulate(Shares *shares, ptrdiff_t n);
void ramp(const Shares *shares, ptrdiff_t t, int n, double *to);
const double *shares_of(const Shares *shares, ptrdiff_t t, int n, double *room);

/* bases.c */
void begin_line(Sweep *sweep, ptrdiff_t row, ptrdiff_t column);
void begin_strip(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, States *states);
double rise_from(const Sweep *sweep, double sum);
int is_fit(const Sweep *sweep, const State *state);

/* around.c: results that are kept together until there are whole lines of the cache of them. */
typedef struct {
    char *to;
    size_t size;
    double room[BLOCK];
} Stage;

void begin_stage(Stage *stage);
char *enter(Stage *stage, char *to, size_t size);
void leave(Stage *stage);
int is_large(const Sweep *sweep);
void end_around(void);

/* lines.c, strips.c: all series of a sweep. */
void in_lines(Sweep *sweep, int threads);
void in_segments(Sweep *sweep, int threads);
void in_strips(Sweep *sweep, int threads);
int has_strips(const Sweep *sweep);

/* Of each instruction set: line_loops.c, and column_loops.c for elements whose neighbours lie side by side. */
typedef struct {
    /* Converts n elements to u = x - base, `step` elements apart; and y to base + post * y, or y where
       post is NULL. */
    void (*read)(double *u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype);
    void (*write)(char *to, const double *y, int n, ptrdiff_t step, double base, const double *post, Dtype dtype);
    /* Steps of a line in whole windows: from the sum before them to the sum after them. float32 or float64; where post
       is NULL, sums of float64. */
    double (*line)(
        char *to, const char *from, int n, double base, double sum, const double *post, const Fading *fading,
        Dtype dtype);
    /* The mean after each step of a line, and the spread before it is divided by the weight; whole windows. */
    void (*spread)(
        double *rises, double *spreads, const double *u, int n, const double *post, const Fading *fading, State *state);
    /* Variances, or their roots, in the place of spreads; and what lies that many times as far from the mean. */
    void (*widths)(double *spreads, int n, const double *factor, double scale, int root);
    void (*edges)(double *to, const double *rises, const double *widths, int n, double far);
    /* A line without writing anything. */
    double (*reach)(const char *from, ptrdiff_t n, double base, double sum, const Fading *fading, Dtype dtype);
    /* The shares of n steps, in whole windows: `1 / (weight + left * ramp[k])` after k steps; see Shares. */
    void (*shares)(double *to, int n, double weight, double left, const double *ramp, double keep);
} LineLoops;

typedef struct {
    /* The smallest and the largest so far, of n columns; begins with the first where `begins`. */
    void (*extremes)(double *low, double *high, const char *from, int n, int begins, Dtype dtype);
    /* `pre` may be NULL. */
    void (*mean)(const Tile *tile, States *states, const double *pre, const Fading *fading);
    void (*spread)(
        const Tile *tile, States *states, const double *factors, double scale, Kind kind, double k,
        const Fading *fading);
} ColumnLoops;

extern const LineLoops LINE[VERSION_COUNT];
extern const ColumnLoops COLUMNS[VERSION_COUNT];

#endif
