/* A small reader of .safetensors files for the examples: one file, few tensors, everything checked.
 * SPDX-License-Identifier: MIT */
#ifndef EXAMPLES_SAFETENSORS_H
#define EXAMPLES_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

enum { ST_MAX_ITEMS = 32, ST_MAX_AXES = 8, ST_MAX_NAME = 64, ST_MAX_TEXT = 256 };

typedef struct {
    char name[ST_MAX_NAME];
    char dtype[8]; /* as the file spells it: "F32", "F16", "BF16", "I32", "I64" */
    size_t n_axes;
    int64_t shape[ST_MAX_AXES]; /* the file's order, outermost axis first */
    void *data;                 /* aligned, `bytes` bytes: what dtype and shape say */
    size_t bytes;
} st_tensor;

typedef struct {
    char key[ST_MAX_NAME];
    char value[ST_MAX_TEXT];
} st_entry;

typedef struct {
    unsigned char *data;
    size_t size;
    size_t n_tensors, n_entries;
    st_tensor tensors[ST_MAX_ITEMS];
    st_entry metadata[ST_MAX_ITEMS];
} st_file;

/* Reads `path`; returns 0, or -1 with a sentence in `error`. Ends with st_close either way. */
int st_open(st_file *file, const char *path, char *error, size_t error_size);
void st_close(st_file *file);

/* The tensor of that name, or NULL. */
st_tensor *st_find(st_file *file, const char *name);
/* The metadata's text under that key, or NULL. */
const char *st_metadata(const st_file *file, const char *key);

#endif
