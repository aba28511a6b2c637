// A call's score and mask function. What cupyflash/_trace_cuda.py has made of them is compiled behind this text, in
// kernels that have them.
#pragma once
#include "function_args.cuh"

template <typename Number>
__device__ Number score_function(Number s, int b, int h, int i, int j, const ScoreArgs& args);

__device__ bool mask_function(int b, int h, int i, int j, const MaskArgs& args);
