/* See fake_cuda.h. The types and numbers are those of NVIDIA's documentation of the driver API; this file includes
 * nothing of it. Every call is checked as a strict driver would: a mistake of the caller is kept and told.
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum { CONTEXTS = 4096, MEMORIES = 8192, LAUNCHES = 4096, MODULES = 8192, NAMES = 64, MODULE_FUNCTIONS = 160 };

struct CUctx_st {
    uint64_t id; /* 0: destroyed, and free to be used again */
    int device, broken;
};
struct CUmod_st {
    CUcontext context; /* null: unloaded */
    uint64_t context_id;
    int functions;
};
struct CUfunc_st {
    CUmodule module;
    int dynamic_shared;
    char name[64];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;
static fake_device devices[FAKE_DEVICES] = {{9, 0, 232448, 132}, {9, 0, 232448, 132}};
static int version = 13000;
static bool initialised, capturing;
static struct CUctx_st contexts[CONTEXTS];
static struct CUmod_st modules[MODULES];
static struct CUfunc_st (*functions)[MODULE_FUNCTIONS]; /* of each module */
static int n_modules;
static uint64_t last_id;
static _Thread_local CUcontext current;

static struct {
    char *start;
    size_t size;
    int place;
} memories[MEMORIES];
static int n_memories;

static fake_launch launched[LAUNCHES];
static size_t n_launched;

static struct {
    const char *function;
    long at, count;
    int code;
    long failures;
    const char *first;
} fault;
static const char *held_function;
static int n_held;
static struct {
    const char *function;
    long calls;
} counts[NAMES];
static char mistake[256];

static void wrong(const char *function, const char *words) {
    if (!mistake[0]) snprintf(mistake, sizeof mistake, "%s: %s", function, words);
}

/* What every entry point does first, with the lock: counts, waits, and fails where that was asked for. Returns with the
 * lock held. */
static CUresult enter(const char *function) {
    pthread_mutex_lock(&lock);
    int at = 0;
    while (at < NAMES - 1 && counts[at].function && strcmp(counts[at].function, function) != 0) at++;
    counts[at].function = function;
    counts[at].calls++;
    while (held_function && strcmp(held_function, function) == 0) {
        n_held++;
        pthread_cond_wait(&released, &lock);
        n_held--;
    }
    if (fault.count == 0 || (fault.function && strcmp(fault.function, function) != 0)) return CUDA_SUCCESS;
    if (fault.at-- > 0) return CUDA_SUCCESS;
    if (fault.count > 0) fault.count--;
    if (!fault.failures++) fault.first = function;
    return fault.code;
}

static CUresult leave(CUresult code) {
    pthread_mutex_unlock(&lock);
    return code;
}

/* The same for entry points that need the current context. */
static CUresult enter_context(const char *function) {
    CUresult code = enter(function);
    if (code) return code;
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (!current->id) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return current->broken;
}

static bool is_loaded(CUmodule module) {
    return module && module->context && module->context->id == module->context_id;
}

/* ---- What the library calls. ---- */

CUresult cuInit(unsigned flags) {
    CUresult code = enter("cuInit");
    if (!code && flags) wrong("cuInit", "flags");
    if (!code) initialised = true;
    return leave(code);
}

CUresult cuDriverGetVersion(int *to) {
    CUresult code = enter("cuDriverGetVersion");
    if (!code) *to = version;
    return leave(code);
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    static const struct {
        CUresult code;
        const char *name;
    } known[] = {
#define NAME(code) {code, #code}
        NAME(CUDA_SUCCESS), NAME(CUDA_ERROR_INVALID_VALUE), NAME(CUDA_ERROR_OUT_OF_MEMORY),
        NAME(CUDA_ERROR_NOT_INITIALIZED), NAME(CUDA_ERROR_DEVICE_UNAVAILABLE), NAME(CUDA_ERROR_NO_DEVICE),
        NAME(CUDA_ERROR_INVALID_DEVICE), NAME(CUDA_ERROR_INVALID_IMAGE), NAME(CUDA_ERROR_INVALID_CONTEXT),
        NAME(CUDA_ERROR_NO_BINARY_FOR_GPU), NAME(CUDA_ERROR_ECC_UNCORRECTABLE), NAME(CUDA_ERROR_INVALID_PTX),
        NAME(CUDA_ERROR_JIT_COMPILER_NOT_FOUND), NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION),
        NAME(CUDA_ERROR_INVALID_HANDLE), NAME(CUDA_ERROR_NOT_FOUND), NAME(CUDA_ERROR_ILLEGAL_ADDRESS),
        NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES), NAME(CUDA_ERROR_CONTEXT_IS_DESTROYED), NAME(CUDA_ERROR_LAUNCH_FAILED),
        NAME(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH), NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED), NAME(CUDA_ERROR_UNKNOWN),
#undef NAME
    };
    CUresult code = enter("cuGetErrorName");
    *name = NULL;
    for (size_t i = 0; !code && i < sizeof known / sizeof *known; i++)
        if (known[i].code == error) *name = known[i].name;
    return leave(code ? code : *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuCtxGetCurrent(CUcontext *to) {
    CUresult code = enter("cuCtxGetCurrent");
    if (!code && !initialised) code = CUDA_ERROR_NOT_INITIALIZED;
    if (!code) *to = current;
    return leave(code);
}

CUresult cuCtxGetId(CUcontext context, unsigned long long *to) {
    CUresult code = enter("cuCtxGetId");
    if (!code && !context) wrong("cuCtxGetId", "no context");
    if (!code && !context->id) code = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (!code) *to = context->id;
    return leave(code);
}

CUresult cuCtxGetDevice(CUdevice *to) {
    CUresult code = enter_context("cuCtxGetDevice");
    if (!code) *to = current->device;
    return leave(code);
}

CUresult cuDeviceGetAttribute(int *to, int attribute, CUdevice device) {
    CUresult code = enter("cuDeviceGetAttribute");
    if (!code && (device < 0 || device >= FAKE_DEVICES)) code = CUDA_ERROR_INVALID_DEVICE;
    if (code) return leave(code);
    switch (attribute) {
        case 16: *to = devices[device].processors; break;
        case 75: *to = devices[device].major; break;
        case 76: *to = devices[device].minor; break;
        case 97: *to = devices[device].shared; break;
        default: wrong("cuDeviceGetAttribute", "an attribute that the fake does not know"), code = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(code);
}

CUresult cuDeviceGetName(char *to, int size, CUdevice device) {
    CUresult code = enter("cuDeviceGetName");
    if (!code) snprintf(to, (size_t) size, "made-up device %d", device);
    return leave(code);
}

CUresult cuModuleLoadData(CUmodule *to, const void *image) {
    /* A fat binary: magic, version, size of the header, size of what follows. */
    struct {
        uint32_t magic;
        uint16_t version, header;
        uint64_t size;
    } header;
    CUresult code = enter_context("cuModuleLoadData");
    if (!code && capturing) code = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (code) return leave(code);
    memcpy(&header, image, sizeof header);
    if ((uintptr_t) image % 8 || header.magic != 0xba55ed50 || header.size == 0) {
        wrong("cuModuleLoadData", "no fat binary");
        return leave(CUDA_ERROR_INVALID_IMAGE);
    }
    if (!functions) functions = calloc(MODULES, sizeof *functions);
    if (!functions || n_modules == MODULES) return leave(CUDA_ERROR_OUT_OF_MEMORY);
    CUmodule module = &modules[n_modules++];
    *module = (struct CUmod_st){current, current->id, 0};
    *to = module;
    return leave(CUDA_SUCCESS);
}

CUresult cuModuleUnload(CUmodule module) {
    CUresult code = enter_context("cuModuleUnload");
    if (!code && (!is_loaded(module) || module->context != current)) {
        wrong("cuModuleUnload", "no module of the current context");
        code = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!code) module->context = NULL;
    return leave(code);
}

CUresult cuModuleGetFunction(CUfunction *to, CUmodule module, const char *name) {
    CUresult code = enter_context("cuModuleGetFunction");
    if (!code && (!is_loaded(module) || module->context != current)) {
        wrong("cuModuleGetFunction", "no module of the current context");
        code = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!code && (strncmp(name, "dn_", 3) != 0 || module->functions == MODULE_FUNCTIONS)) code = CUDA_ERROR_NOT_FOUND;
    if (code) return leave(code);
    CUfunction function = &functions[module - modules][module->functions++];
    function->module = module;
    function->dynamic_shared = 48 << 10;
    snprintf(function->name, sizeof function->name, "%s", name);
    *to = function;
    return leave(CUDA_SUCCESS);
}

static CUresult enter_function(const char *called, CUfunction function) {
    CUresult code = enter_context(called);
    if (code || (function && is_loaded(function->module) && function->module->context == current)) return code;
    wrong(called, "no function of the current context");
    return CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuFuncGetAttribute(int *to, int attribute, CUfunction function) {
    CUresult code = enter_function("cuFuncGetAttribute", function);
    if (code) return leave(code);
    const fake_device *device = &devices[current->device];
    switch (attribute) {
        case 4: *to = 64; break;                                        /* registers */
        case 5: case 6: *to = 10 * device->major + device->minor; break; /* compiled for */
        default: wrong("cuFuncGetAttribute", "an attribute that the fake does not know"), code = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(code);
}

CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    CUresult code = enter_function("cuFuncSetAttribute", function);
    if (!code && (attribute != 8 || value < 0 || value > devices[current->device].shared)) {
        wrong("cuFuncSetAttribute", "not the dynamic shared memory, or more than the device has");
        code = CUDA_ERROR_INVALID_VALUE;
    }
    if (!code) function->dynamic_shared = value;
    return leave(code);
}

static CUresult take(CUfunction function, fake_launch launch, void **arguments) {
    const char *words = NULL;
    for (int axis = 0; axis < 3; axis++)
        if (launch.grid[axis] == 0 || launch.grid[axis] > (axis ? 65535u : 2147483647u)) words = "grid";
    if (launch.threads == 0 || launch.threads > 1024) words = "threads";
    if (launch.shared > (unsigned) function->dynamic_shared) words = "more shared memory than the function may have";
    if (!arguments || !arguments[0]) words = "no arguments";
    if (words) return wrong(function->name, words), CUDA_ERROR_INVALID_VALUE;
    launch.context = current;
    snprintf(launch.kernel, sizeof launch.kernel, "%s", function->name);
    if (n_launched < LAUNCHES) launched[n_launched++] = launch;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
    CUresult code = enter_function("cuLaunchKernel", function);
    if (!code && (threads_y != 1 || threads_z != 1 || extra)) wrong("cuLaunchKernel", "not what this library launches");
    if (!code)
        code = take(function, (fake_launch){.stream = stream, .grid = {x, y, z}, .threads = threads, .shared = shared},
                    arguments);
    return leave(code);
}

typedef struct {
    unsigned grid[3], threads[3], shared;
    CUstream stream;
    struct {
        int id;
        char padding[4], value[64];
    } *attributes;
    unsigned n_attributes;
} launch_config;

CUresult cuLaunchKernelEx(const launch_config *config, CUfunction function, void **arguments, void **extra) {
    CUresult code = enter_function("cuLaunchKernelEx", function);
    if (code) return leave(code);
    const unsigned *x = config->grid;
    int serialization = 0;
    if (config->n_attributes == 1 && config->attributes[0].id == 6)
        memcpy(&serialization, config->attributes[0].value, sizeof serialization);
    if (config->threads[1] != 1 || config->threads[2] != 1 || extra || serialization != 1)
        wrong("cuLaunchKernelEx", "not what this library launches");
    fake_launch launch = {.stream = config->stream, .grid = {x[0], x[1], x[2]}, .threads = config->threads[0],
                          .shared = config->shared, .overlap = true};
    return leave(take(function, launch, arguments));
}

CUresult cuPointerGetAttributes(unsigned count, const int *attributes, void **values, unsigned long long address) {
    CUresult code = enter_context("cuPointerGetAttributes");
    if (code) return leave(code);
    const int unknown = 1 << 30;
    int place = unknown;
    for (int i = 0; i < n_memories; i++)
        if (address - (uintptr_t) memories[i].start < memories[i].size) place = memories[i].place;
    for (unsigned i = 0; i < count; i++) {
        /* Of memory that CUDA does not know everything is null, and the device -2. */
        int value = 0;
        switch (attributes[i]) {
            case 2: value = place == unknown ? 0 : place == FAKE_HOST ? 1 : 2; break;
            case 8: value = place == FAKE_MANAGED; break;
            case 9: value = place == unknown ? -2 : place < 0 ? 0 : place; break;
            default: wrong("cuPointerGetAttributes", "an attribute that the fake does not know");
        }
        memcpy(values[i], &value, sizeof value);
    }
    return leave(CUDA_SUCCESS);
}

/* ---- What tests call. ---- */

static CUcontext create(int device) {
    pthread_mutex_lock(&lock);
    /* The lowest address that is free, so that contexts come back at addresses of dead ones, as malloc would have it. */
    CUcontext context = contexts;
    while (context->id) context++;
    *context = (struct CUctx_st){++last_id, device, CUDA_SUCCESS};
    pthread_mutex_unlock(&lock);
    return current = context;
}

static void destroy(CUcontext context) {
    pthread_mutex_lock(&lock);
    context->id = 0;
    pthread_mutex_unlock(&lock);
}

static void set_current(CUcontext context) { current = context; }

static void *allocate(size_t size, int place) {
    void *start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || n_memories == MEMORIES) abort();
    pthread_mutex_lock(&lock);
    memories[n_memories].start = start;
    memories[n_memories].size = size;
    memories[n_memories++].place = place;
    pthread_mutex_unlock(&lock);
    return start;
}

static void capture(bool begins) {
    pthread_mutex_lock(&lock);
    capturing = begins;
    pthread_mutex_unlock(&lock);
}

static void fail(const char *function, long at, long count, int code) {
    pthread_mutex_lock(&lock);
    fault.function = function, fault.at = at, fault.count = count, fault.code = code;
    fault.failures = 0, fault.first = NULL;
    pthread_mutex_unlock(&lock);
}

static long failed(void) { return fault.failures; }
static const char *failed_function(void) { return fault.first; }

static void break_context(CUcontext context, int code) {
    pthread_mutex_lock(&lock);
    context->broken = code;
    pthread_mutex_unlock(&lock);
}

static void hold(const char *function) {
    pthread_mutex_lock(&lock);
    held_function = function;
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&lock);
}

static int held(void) {
    pthread_mutex_lock(&lock);
    int n = n_held;
    pthread_mutex_unlock(&lock);
    return n;
}

static long calls(const char *function) {
    long all = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < NAMES && counts[i].function; i++)
        if (!function || strcmp(counts[i].function, function) == 0) all += counts[i].calls;
    pthread_mutex_unlock(&lock);
    return all;
}

static long loaded_modules(void) {
    long loaded = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_modules; i++) loaded += is_loaded(&modules[i]);
    pthread_mutex_unlock(&lock);
    return loaded;
}

static size_t launches(fake_launch *into, size_t room) {
    pthread_mutex_lock(&lock);
    size_t n = n_launched;
    memcpy(into, launched, (n < room ? n : room) * sizeof *into);
    n_launched = 0;
    pthread_mutex_unlock(&lock);
    return n;
}

static int first_mistake(const char **words) {
    *words = mistake;
    return mistake[0] != 0;
}

/* fork copies the lock as it is; a child of a real driver's process gets no further than this either. */
static void lock_all(void) { pthread_mutex_lock(&lock); }
static void unlock_all(void) { pthread_mutex_unlock(&lock); }

__attribute__((constructor)) static void start(void) {
    pthread_atfork(lock_all, unlock_all, unlock_all);
    /* A driver that takes its time to be loaded. */
    const char *milliseconds = getenv("FAKE_CUDA_LOADS_IN");
    if (milliseconds) usleep((useconds_t) atoi(milliseconds) * 1000);
}

const fake_controls fake_cuda = {
    .create = create, .destroy = destroy, .set_current = set_current, .allocate = allocate, .capture = capture,
    .devices = devices, .version = &version, .fail = fail, .failed = failed, .failed_function = failed_function,
    .break_context = break_context, .hold = hold, .held = held, .calls = calls, .modules = loaded_modules,
    .launches = launches, .first_mistake = first_mistake,
};
