// What a launch of an sm_90 kernel carries: Params, and maps of the tensors that it copies by TMA, mirrored by
// cupyflash/_tma.py. A map has 5 dimensions: (column, row, head, last batch axis, the one before); a box of it is 64
// columns by the rows of a tile.
#pragma once
#include "params.cuh"
#include "mma_sm90.cuh"

struct MappedParams {
  TensorMap map_q, map_k, map_v, map_dout;
  Params params;
};

static_assert(sizeof(MappedParams) == MAPPED_PARAMS_BYTES, "kernels/params_sm90.cuh and cupyflash/_tma.py differ");
