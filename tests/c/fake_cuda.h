/* A made-up libcuda for tests of what goes wrong: tests/c/fake_cuda.c. It has devices, contexts, modules and memory, takes
 * launches and runs none, and fails where it is told to.
 * SPDX-License-Identifier: MIT */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stdbool.h>
#include <stddef.h>

/* CUresult, as cuda.h numbers it. */
enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_ECC_UNCORRECTABLE = 214,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_JIT_COMPILER_NOT_FOUND = 221,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_UNKNOWN = 999
};

typedef struct CUctx_st *CUcontext;

typedef struct {
    int major, minor;
    int shared; /* bytes a block may opt in to */
    int processors;
} fake_device;

/* A launch that was taken. */
typedef struct {
    char kernel[64];
    CUcontext context;
    void *stream;
    unsigned grid[3], threads, shared;
    bool overlap; /* through cuLaunchKernelEx, with programmatic serialization */
} fake_launch;

enum { FAKE_DEVICES = 2, FAKE_HOST = -1 /* pinned */, FAKE_MANAGED = -2 };

/* Exported as `fake_cuda`. */
typedef struct {
    /* What a test has to hand that the library never calls. */
    CUcontext (*create)(int device); /* makes it current */
    void (*destroy)(CUcontext context);
    void (*set_current)(CUcontext context); /* may be null */
    /* Addresses that nobody may touch; `place` is a device, FAKE_HOST or FAKE_MANAGED. Never freed. */
    void *(*allocate)(size_t size, int place);
    void (*capture)(bool begins); /* of a stream of the current context, in global mode */

    /* What the driver is like. */
    fake_device *devices; /* FAKE_DEVICES */
    int *version;

    /* Makes calls of `function` (null: any) fail with `code`: `count` of them (negative: all that follow), from the `at`th
     * from now on, 0 being the next. Replaces what was asked for before; count 0 ends it. */
    void (*fail)(const char *function, long at, long count, int code);
    long (*failed)(void); /* calls that failed so */
    const char *(*failed_function)(void); /* the first of them */
    /* From now on every call in the context is answered with `code`, as after a kernel's access to a bad address. */
    void (*break_context)(CUcontext context, int code);
    /* Makes calls of `function` wait until it is null again. */
    void (*hold)(const char *function);
    int (*held)(void); /* calls that wait */

    /* What has happened. */
    long (*calls)(const char *function); /* null: all */
    long (*modules)(void); /* that are loaded */
    size_t (*launches)(fake_launch *into, size_t room); /* since the last call */
    int (*first_mistake)(const char **words); /* a call that no driver would take: 0 for none */
} fake_controls;

#endif
