/* What weigh.c and average.c share: series of which each step is another. Two passes, so that what many series have in
   common is computed once. */

#ifndef EWMA_STEPS_H
#define EWMA_STEPS_H

#include "scan.h"

/* Series at most; and all arrays of a call, with its state. */
enum { SERIES = 2, VIEWS = 12 };

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

#endif
