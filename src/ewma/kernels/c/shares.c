/* How what was fades from step to step, and what each step's sum is multiplied by. */

#include "scan.h"

#include <stdlib.h>

/* Steps whose shares are kept for all series. */
enum { TABLE = 1 << 16 };

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

int read_lost(Sweep *sweep, double lost)
{
    if (!(lost >= 0.0 && lost <= 1.0))
        return fail("scan: expected lost from 0 to 1");
    prepare_fading(&sweep->fading, lost);
    return 0;
}

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
    LINE[chosen].shares(to, n, ramped + left * shares->held, left * (1.0 - shares->lost * shares->held), shares->ramp,
                         shares->keep);
}

/* A table of those of the first n steps, for many series to have in common; it is to be freed. -1 where there is no
   memory. */
int tabulate(Shares *shares, ptrdiff_t n)
{
    const ptrdiff_t most = shares->settled < n ? shares->settled : n;
    const ptrdiff_t known = ((most < TABLE ? most : TABLE) + BLOCK - 1) / BLOCK * BLOCK;
    double *table = known ? malloc((size_t)known * sizeof(double)) : NULL;
    for (ptrdiff_t t = 0; table && t < known; t += BLOCK)
        ramp(shares, t, BLOCK, table + t);
    shares->table = table;
    shares->known = table ? known : 0;
    return known && !table ? -1 : 0;
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

