// An LM head's chunks in tiles, without a place for their logits: where the device is a Hopper GPU, and the extension
// has code for it.
#pragma once

#include <ATen/core/Tensor.h>

namespace vgpo {
namespace cuda {

struct HeadStatisticsArguments;
struct HeadGradientArguments;

// Columns of the workspace, fp32, that holds the statistics of a row's tiles.
int64_t tile_workspace_columns(int64_t columns);

// Whether tiles can compute the products of these matrices: on a Hopper GPU, of 16-bit numbers, rows that begin at
// multiples of 16 bytes. Not if VGPO_HEAD_TILES is 0 in the environment.
bool suits_tiles(const at::Tensor& hidden, const at::Tensor& weight, bool has_bias);

// What head_statistics does, with `rows.products` as the workspace.
void launch_tile_statistics(const at::Tensor& hidden, const at::Tensor& weight, const HeadStatisticsArguments& call);

// What head_gradient does with the products that it computes itself.
void launch_tile_gradient(const at::Tensor& hidden, const at::Tensor& weight, const HeadGradientArguments& call);

}  // namespace cuda
}  // namespace vgpo
