// What ik_llama.cpp's header of this name declares, to compile the drop-in for it against llama.cpp's headers: the parts
// of ggml-cuda that it uses are the same in both.
// SPDX-License-Identifier: MIT
#include "common.cuh"

void ggml_cuda_op_delta_net(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
