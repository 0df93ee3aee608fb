/* What the compiled kernels share: numbers and their bits, instruction sets, threads. */

#ifndef EWMA_NATIVE_H
#define EWMA_NATIVE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

/* Added to by several threads. */
#if defined(__GNUC__)
#define ADD(to, amount) __atomic_fetch_add(to, amount, __ATOMIC_RELAXED)
#else
#define ADD(to, amount) (*(to) += (amount))
#endif

/* Fetch the next block while this one is worked on: passes over what is in the cache let the memory idle. */
#if defined(__GNUC__)
#define PREFETCH(from, bytes)                      \
    for (size_t at = 0; at < (bytes); at += 64)    \
        __builtin_prefetch((const char *)(from) + at, 1)
#else
#define PREFETCH(from, bytes)
#endif

typedef enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 } Dtype;

INLINE size_t size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == FLOAT64 ? 8 : 2; }

/* Numbers and their bits. */

INLINE uint32_t bits_of_float(float x) { uint32_t u; memcpy(&u, &x, sizeof u); return u; }
INLINE uint64_t bits_of_double(double x) { uint64_t u; memcpy(&u, &x, sizeof u); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, sizeof x); return x; }
INLINE double double_of(uint64_t u) { double x; memcpy(&x, &u, sizeof x); return x; }

INLINE float float_of_half(uint32_t half)
{
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000;
    const uint32_t subnormal = bits_of_float((float)(int32_t)magnitude * 0x1p-24f);
    return float_of(sign | (magnitude < 0x400 ? subnormal : magnitude < 0x7c00 ? normal : special));
}

INLINE uint16_t bfloat_of(float x)
{
    const uint32_t u = bits_of_float(x);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE float read_float(const void *from, int i, Dtype dtype)
{
    switch (dtype) {
    case FLOAT32: return ((const float *)from)[i];
    case FLOAT64: return (float)((const double *)from)[i];
    case BFLOAT16: return float_of((uint32_t)((const uint16_t *)from)[i] << 16);
    default: return float_of_half(((const uint16_t *)from)[i]);
    }
}

INLINE double read_double(const void *from, int i, Dtype dtype)
{
    return dtype == FLOAT64 ? ((const double *)from)[i] : (double)read_float(from, i, dtype);
}

INLINE uint16_t half_of(float x)
{
    const uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of_float(float_of(size) + 0.5f) - bits_of_float(0.5f);
    const uint32_t finite = size < 0x38800000 ? subnormal : normal < 0x7c00 ? normal : 0x7c00;
    return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : finite));
}

INLINE void write_double(void *to, int i, double x, Dtype dtype)
{
    switch (dtype) {
    case FLOAT32: ((float *)to)[i] = (float)x; break;
    case FLOAT64: ((double *)to)[i] = x; break;
    case BFLOAT16: ((uint16_t *)to)[i] = bfloat_of((float)x); break;
    default: ((uint16_t *)to)[i] = half_of((float)x);
    }
}

/* Each loop is compiled once for each instruction set; which one runs is found out when the module is loaded. */

typedef enum {
#if defined(__GNUC__) && defined(__x86_64__)
#define MANY_INSTRUCTION_SETS
    AVX512,
    AVX2,
#endif
    BASELINE,
    VERSION_COUNT
} Version;

#ifdef MANY_INSTRUCTION_SETS
#define TARGET_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#if defined(__clang__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#else
#define TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")))
#endif
#define EACH_VERSION(COMPILE) COMPILE(avx512, TARGET_AVX512) COMPILE(avx2, TARGET_AVX2) COMPILE(baseline, )
#define OF_EACH_VERSION(OF) {[AVX512] = OF(avx512), [AVX2] = OF(avx2), [BASELINE] = OF(baseline)}
#else
#define EACH_VERSION(COMPILE) COMPILE(baseline, )
#define OF_EACH_VERSION(OF) {[BASELINE] = OF(baseline)}
#endif

extern Version chosen;

/* Calls `part(work, index)` for every index below `count`, on at most so many threads; see pool.c. */
typedef void Part(void *work, size_t index);
void share(Part *part, void *work, size_t count, int threads);
void prepare_threads(void);

PyObject *py_lerp(PyObject *module, PyObject *arguments); /* in lerp.c */
PyObject *py_mean(PyObject *module, PyObject *arguments); /* in means.c */
PyObject *py_scan(PyObject *module, PyObject *arguments);
PyObject *py_scan_elements(PyObject *module, PyObject *arguments); /* in elements.c */
PyObject *py_weigh(PyObject *module, PyObject *arguments); /* in weigh.c */
PyObject *py_average(PyObject *module, PyObject *arguments); /* in average.c */
PyObject *py_spread(PyObject *module, PyObject *arguments); /* in spread.c */
PyObject *py_places(PyObject *module, PyObject *arguments); /* in places.c */
PyObject *py_moved(PyObject *module, PyObject *arguments);

#endif
