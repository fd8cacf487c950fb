// The operators of the CPU backend, as their schemas in vgpo_kernels/ops have them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace vgpo::ops {

at::Tensor visual_prototype(const at::Tensor& hidden, const at::Tensor& visual_mask, const OptionalTensor& cu_seqlens);

at::Tensor visual_focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                        const OptionalTensor& prototype_index);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> visual_weights(
    const at::Tensor& cos, const at::Tensor& response_mask, const at::Tensor& group_ids,
    const OptionalTensor& has_visual, const OptionalTensor& cu_seqlens, at::ArrayRef<double> config);

at::Tensor group_weights(const at::Tensor& score, const at::Tensor& group_ids, const OptionalTensor& has_visual,
                         at::ArrayRef<double> config);

LossTensors policy_loss(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                        const at::Tensor& response_mask, const OptionalTensor& factors,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& ref_logp,
                        const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                        const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                        at::ArrayRef<double> options);

LossTensors vgpo_loss(const at::Tensor& hidden, const at::Tensor& logp, const at::Tensor& old_logp,
                      const at::Tensor& advantages, const OptionalTensor& visual_mask, const at::Tensor& response_mask,
                      const at::Tensor& group_ids, const OptionalTensor& cu_seqlens, const OptionalTensor& prototype,
                      const OptionalTensor& prototype_index, const OptionalTensor& ref_logp,
                      const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                      const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                      at::ArrayRef<double> config, at::ArrayRef<double> options);

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_mass(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments, const OptionalTensor& query_positions,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t num_segments, double scale,
    int64_t window, bool per_head);

std::tuple<at::Tensor, at::Tensor> attention_mass_backward(
    const at::Tensor& grad_mass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const at::Tensor& head_mass, const at::Tensor& lse, double scale, int64_t window);

at::Tensor attention_heatmap(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                             const OptionalTensor& query_positions, const at::Tensor& query_weights,
                             const at::Tensor& lse, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, double scale, int64_t window, bool per_head);

std::tuple<at::Tensor, at::Tensor> attention_heatmap_backward(
    const at::Tensor& grad_heat, const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
    const OptionalTensor& query_positions, const at::Tensor& query_weights, const at::Tensor& lse,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double scale, int64_t window);

void head_statistics(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                     const at::Tensor& targets, int64_t first, double temperature, at::Tensor& statistics,
                     at::Tensor& logits, bool keep);

void head_gradient(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                   const at::Tensor& targets, int64_t first, double temperature, const at::Tensor& coefficients,
                   at::Tensor& logits, bool recompute);

void head_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& result, bool accumulate);

}  // namespace vgpo::ops
