// The arrays of score_args and mask_args: where they lie. Mirrored by cupyflash/_score_args.py. Shapes are run-time
// values.
#pragma once

struct ArgumentArray {
  const void* data;
  long long stride[4];  // in elements; axes the array does not have: 0
  int length[4];        // axes it does not have: 1
};

struct FunctionArgs {
  ArgumentArray array[8];  // those that a call does not have: nullptr
};
using ScoreArgs = FunctionArgs;
using MaskArgs = FunctionArgs;

static_assert(sizeof(FunctionArgs) == FUNCTION_ARGS_BYTES, "function_args.cuh and _score_args.py have drifted apart");
