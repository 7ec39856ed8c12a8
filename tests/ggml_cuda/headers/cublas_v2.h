/* Names of cuBLAS that ggml-cuda's common.cuh mentions, to compile one file against it where there is no cuBLAS (its
 * package has 400 MB). Nothing here is called or linked.
 * SPDX-License-Identifier: MIT */
#pragma once

#define CUBLAS_VER_MAJOR 13
#define CUBLAS_VER_MINOR 0

typedef struct cublasContext *cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
typedef enum { CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
typedef enum { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F } cublasComputeType_t;

extern "C" {
const char *cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate_v2(cublasHandle_t *);
cublasStatus_t cublasDestroy_v2(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream_v2(cublasHandle_t, struct CUstream_st *);
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, unsigned long);
}
#define cublasCreate cublasCreate_v2
#define cublasDestroy cublasDestroy_v2
#define cublasSetStream cublasSetStream_v2
#define cublasSetWorkspace cublasSetWorkspace_v2
