/* Frozen: what include/deltanet.h of version 0.1 lays down for programs, without its words. Programs built with it run
 * with every later libdeltanet.so.0. Never edit. SPDX-License-Identifier: MIT */
#ifndef LAYOUT_0_1_H
#define LAYOUT_0_1_H

#include <stddef.h>
#include <stdint.h>

typedef struct deltanet_tensor {
    void *data;
    int64_t ne[4];
    size_t nb[4];
    uint32_t dtype;
    uint32_t reserved;
} deltanet_tensor;

typedef struct deltanet_params {
    uint32_t struct_size;
    uint32_t head_map;
    uint32_t state_layout;
    uint32_t beta_kind;
    deltanet_tensor q;
    deltanet_tensor k;
    deltanet_tensor v;
    deltanet_tensor g;
    deltanet_tensor beta;
    deltanet_tensor state_in;
    deltanet_tensor out;
    deltanet_tensor state_out;
    deltanet_tensor snapshots;
    deltanet_tensor rows_in;
    deltanet_tensor rows_out;
    deltanet_tensor cu_seqlens;
    size_t snapshot_stride;
    uint32_t snapshot_slots;
    uint32_t n_snapshots;
    uint32_t snapshot_order;
    uint32_t snapshot_skip;
    float scale;
    float gate_max;
    float state_clamp;
    uint32_t qk_norm;
    float qk_norm_eps;
    uint32_t precision;
} deltanet_params;

enum { LAYOUT_PARAMS_SIZE = 1024, LAYOUT_TENSOR_SIZE = 80 };

enum { STATUS_OK = 0, STATUS_STRUCT_SIZE = 3, STATUS_UNKNOWN_VALUE = 4 };
enum { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2, DTYPE_I32 = 3, DTYPE_I64 = 4 };
enum { HEAD_MAP_TILED = 0, HEAD_MAP_GROUPED = 1 };
enum { STATE_KEY_CONTIGUOUS = 0, STATE_VALUE_CONTIGUOUS = 1 };
enum { BETA_VALUE = 0, BETA_LOGIT = 1 };
enum { NEWEST_FIRST = 0, OLDEST_FIRST = 1 };

uint32_t deltanet_supports(const deltanet_params *params);
uint32_t deltanet_run(const deltanet_params *params, uint32_t n_threads);
uint32_t deltanet_scratch_size(const deltanet_params *params, size_t *size);
uint32_t deltanet_run_part(const deltanet_params *params, uint32_t ith, uint32_t nth, void *scratch, size_t size);
uint32_t deltanet_describe(const deltanet_params *params, char *text, size_t size);
const char *deltanet_last_error(void);
const char *deltanet_status_name(uint32_t status);
uint32_t deltanet_version(void);

#endif
