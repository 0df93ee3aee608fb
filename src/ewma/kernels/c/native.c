/* The module as Python sees it, and which of the instruction sets its loops were compiled for runs here. */

#include "native.h"

static const char *const NAMES[VERSION_COUNT] = {
#ifdef MANY_INSTRUCTION_SETS
    [AVX512] = "avx512",
    [AVX2] = "avx2",
#endif
    [BASELINE] = "baseline",
};

Version chosen = BASELINE;

static int runs_here(Version version)
{
#ifdef MANY_INSTRUCTION_SETS
    __builtin_cpu_init();
    if (version == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (version == AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#endif
    return version == BASELINE;
}

static PyObject *py_instruction_sets(PyObject *module, PyObject *unused)
{
    PyObject *names = PyList_New(0);
    for (Version version = 0; names && version < VERSION_COUNT; version++)
        if (runs_here(version)) {
            PyObject *name = PyUnicode_FromString(NAMES[version]);
            if (!name || PyList_Append(names, name) < 0)
                Py_CLEAR(names);
            Py_XDECREF(name);
        }
    return names;
}

static PyObject *py_use(PyObject *module, PyObject *name)
{
    for (Version version = 0; version < VERSION_COUNT; version++)
        if (PyUnicode_CompareWithASCIIString(name, NAMES[version]) == 0 && runs_here(version)) {
            const char *before = NAMES[chosen];
            chosen = version;
            return PyUnicode_FromString(before);
        }
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set called %R", name);
}

static PyMethodDef METHODS[] = {
    {"lerp", py_lerp, METH_VARARGS, NULL},
    {"mean", py_mean, METH_VARARGS, NULL},
    {"scan", py_scan, METH_VARARGS, NULL},
    {"scan_elements", py_scan_elements, METH_VARARGS, NULL},
    {"weigh", py_weigh, METH_VARARGS, NULL},
    {"average", py_average, METH_VARARGS, NULL},
    {"spread", py_spread, METH_VARARGS, NULL},
    {"places", py_places, METH_VARARGS, NULL},
    {"moved", py_moved, METH_VARARGS, NULL},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, NULL},
    {"use", py_use, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int prepare_module(PyObject *module)
{
    (void)module;
    chosen = 0;
    while (!runs_here(chosen))
        chosen++;
    prepare_threads();
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, prepare_module}, {0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "ewma.kernels._native", NULL, 0, METHODS, SLOTS, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&MODULE);
}
