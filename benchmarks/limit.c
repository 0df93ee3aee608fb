/* What the memory allows: the plainest loop over one contiguous pair of buffers, compiled for this machine. */

#include <stdint.h>
#include <string.h>

static float widened(uint16_t x)
{
    const uint32_t u = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &u, sizeof wide);
    return wide;
}

static uint16_t narrowed(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#define LIMIT(name, average_type, value_type, read_average, read_value, write)                            \
    void name(average_type *restrict average, const value_type *restrict value, long n, float c, int threads) \
    {                                                                                                      \
        _Pragma("omp parallel for simd num_threads(threads) schedule(dynamic, 1 << 17)")                  \
        for (long i = 0; i < n; i++)                                                                       \
            average[i] = write(read_average(average[i]) + c * (read_value(value[i]) - read_average(average[i]))); \
    }

LIMIT(float32, float, float, , , )
LIMIT(bfloat16_into_float32, float, uint16_t, , widened, )
LIMIT(bfloat16, uint16_t, uint16_t, widened, widened, narrowed)

void filter(float *restrict average, float *restrict gradient, long n, float c, float raw, float slow, int threads)
{
    _Pragma("omp parallel for simd num_threads(threads) schedule(dynamic, 1 << 17)")
    for (long i = 0; i < n; i++) {
        average[i] += c * (gradient[i] - average[i]);
        gradient[i] = raw * gradient[i] + slow * average[i];
    }
}
