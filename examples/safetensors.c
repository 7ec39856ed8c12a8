/* SPDX-License-Identifier: MIT */
#include "safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The header's JSON text while it is read. `error` is set by the first thing that is not as it must be. */
typedef struct {
    const char *at, *end;
    const char *error;
} json;

static void fail(json *j, const char *error) {
    if (!j->error) j->error = error;
}

static char peek(json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) j->at++;
    return j->error || j->at == j->end ? '\0' : *j->at;
}

static int accept(json *j, char c) {
    if (peek(j) != c) return 0;
    j->at++;
    return 1;
}

static void expect(json *j, char c) {
    if (!accept(j, c)) fail(j, "the header is not the JSON that it should be");
}

/* A string without escapes (names, dtypes and this project's metadata have none), cut to nothing if it does not fit. */
static void string(json *j, char *to, size_t size) {
    expect(j, '"');
    size_t n = 0;
    for (; !j->error && j->at < j->end && *j->at != '"'; j->at++) {
        if (*j->at == '\\') fail(j, "the header has a string with escapes, which this reader does not know");
        else if (n + 1 >= size) fail(j, "the header has a longer string than this reader takes");
        else to[n++] = *j->at;
    }
    to[n] = '\0';
    expect(j, '"');
}

/* A number that counts something. */
static int64_t count(json *j) {
    char c = peek(j);
    if (c < '0' || c > '9') fail(j, "the header has something else where a count belongs");
    int64_t value = 0;
    while (!j->error && j->at < j->end && *j->at >= '0' && *j->at <= '9') {
        int digit = *j->at++ - '0';
        if (value > (INT64_MAX - digit) / 10) fail(j, "the header has a number past 63 bits");
        else value = value * 10 + digit;
    }
    return value;
}

static size_t counts(json *j, int64_t *to, size_t most) {
    size_t n = 0;
    expect(j, '[');
    if (accept(j, ']')) return 0;
    do {
        int64_t value = count(j);
        if (n == most) fail(j, "the header has a longer list than this reader takes");
        else to[n++] = value;
    } while (!j->error && accept(j, ','));
    expect(j, ']');
    return n;
}

static size_t element_size(const char *dtype) {
    static const struct { const char *name; size_t size; } known[] = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4}, {"U8", 1}, {"I8", 1}, {"BOOL", 1},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(dtype, known[i].name)) return known[i].size;
    return 0;
}

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} */
static void tensor(json *j, st_file *file, const char *name) {
    if (file->n_tensors == ST_MAX_ITEMS) {
        fail(j, "the file has more tensors than this reader takes");
        return;
    }
    st_tensor *t = &file->tensors[file->n_tensors];
    memcpy(t->name, name, sizeof t->name);
    int64_t offsets[2] = {0, 0};
    int seen = 0;
    expect(j, '{');
    do {
        char key[ST_MAX_NAME];
        string(j, key, sizeof key);
        expect(j, ':');
        if (!strcmp(key, "dtype")) string(j, t->dtype, sizeof t->dtype), seen |= 1;
        else if (!strcmp(key, "shape")) t->n_axes = counts(j, t->shape, ST_MAX_AXES), seen |= 2;
        else if (!strcmp(key, "data_offsets")) seen |= counts(j, offsets, 2) == 2 ? 4 : 0;
        else fail(j, "a tensor has a field that this reader does not know");
    } while (!j->error && accept(j, ','));
    expect(j, '}');
    if (j->error) return;
    size_t size = element_size(t->dtype);
    if (seen != 7 || size == 0) {
        fail(j, "a tensor lacks dtype, shape or data_offsets, or its dtype is unknown");
        return;
    }
    uint64_t begin = (uint64_t) offsets[0], end = (uint64_t) offsets[1], bytes = size;
    for (size_t axis = 0; axis < t->n_axes; axis++) {
        uint64_t n = (uint64_t) t->shape[axis];
        if (n && bytes > UINT64_MAX / n) {
            fail(j, "a tensor's shape is larger than any memory");
            return;
        }
        bytes *= n;
    }
    if (begin > end || end > file->size || end - begin != bytes || begin % size) {
        fail(j, "a tensor's data_offsets do not agree with its shape, or lie outside the file");
        return;
    }
    t->data = file->data + begin;
    t->bytes = (size_t) bytes;
    file->n_tensors++;
}

static void metadata(json *j, st_file *file) {
    expect(j, '{');
    if (accept(j, '}')) return;
    do {
        if (file->n_entries == ST_MAX_ITEMS) {
            fail(j, "the metadata has more entries than this reader takes");
            return;
        }
        st_entry *entry = &file->metadata[file->n_entries++];
        string(j, entry->key, sizeof entry->key);
        expect(j, ':');
        string(j, entry->value, sizeof entry->value);
    } while (!j->error && accept(j, ','));
    expect(j, '}');
}

static void header(json *j, st_file *file) {
    expect(j, '{');
    if (!accept(j, '}')) {
        do {
            char name[ST_MAX_NAME];
            string(j, name, sizeof name);
            expect(j, ':');
            if (!strcmp(name, "__metadata__")) metadata(j, file);
            else tensor(j, file, name);
        } while (!j->error && accept(j, ','));
        expect(j, '}');
    }
    if (peek(j)) fail(j, "the header goes on after its JSON");
}

/* The whole file in memory, or NULL. */
static unsigned char *slurp(const char *path, size_t *size) {
    FILE *stream = fopen(path, "rb");
    if (!stream) return NULL;
    unsigned char *bytes = NULL;
    long length = -1;
    if (!fseek(stream, 0, SEEK_END) && (length = ftell(stream)) >= 0 && !fseek(stream, 0, SEEK_SET)) {
        bytes = malloc((size_t) length + 1);
        if (bytes && fread(bytes, 1, (size_t) length, stream) != (size_t) length) {
            free(bytes);
            bytes = NULL;
        }
    }
    fclose(stream);
    *size = bytes ? (size_t) length : 0;
    return bytes;
}

int st_open(st_file *file, const char *path, char *error, size_t error_size) {
    memset(file, 0, sizeof *file);
    size_t size;
    unsigned char *bytes = slurp(path, &size);
    if (!bytes) {
        snprintf(error, error_size, "%s cannot be read", path);
        return -1;
    }
    /* Eight bytes: the header's length, little-endian. */
    uint64_t length = 0;
    for (int i = 7; i >= 0 && size >= 8; i--) length = length << 8 | bytes[i];
    if (size < 8 || length > size - 8) {
        snprintf(error, error_size, "%s is not a safetensors file: its header does not fit in it", path);
        free(bytes);
        return -1;
    }
    json j = {(const char *) bytes + 8, (const char *) bytes + 8 + length, NULL};
    file->size = size - 8 - (size_t) length;
    file->data = malloc(file->size + 1); /* of its own, so that elements are aligned wherever the header ends */
    if (!file->data) fail(&j, "there is no memory for it");
    else {
        memcpy(file->data, bytes + 8 + length, file->size);
        header(&j, file);
    }
    free(bytes);
    if (!j.error) return 0;
    snprintf(error, error_size, "%s is not a safetensors file for this reader: %s", path, j.error);
    st_close(file);
    return -1;
}

void st_close(st_file *file) {
    free(file->data);
    memset(file, 0, sizeof *file);
}

st_tensor *st_find(st_file *file, const char *name) {
    for (size_t i = 0; i < file->n_tensors; i++)
        if (!strcmp(file->tensors[i].name, name)) return &file->tensors[i];
    return NULL;
}

const char *st_metadata(const st_file *file, const char *key) {
    for (size_t i = 0; i < file->n_entries; i++)
        if (!strcmp(file->metadata[i].key, key)) return file->metadata[i].value;
    return NULL;
}
