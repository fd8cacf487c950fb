// Tensors as the stages take them. The public functions have checked dtypes and shapes; what is asked again here
// keeps a direct call of an operator from reading outside its arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <tuple>

#include "kernels.h"
#include "../layout.h"
#include "stages.h"

namespace vgpo {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_contiguous(const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                          tensor.sizes() == shape,
                      name, " must be a contiguous ", dtype, " CPU tensor of shape ", shape, ", got ",
                      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

template <typename T>
const T* checked(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
    check_contiguous(name, tensor, c10::CppTypeToScalarType<T>::value, shape);
    return tensor.const_data_ptr<T>();
}

template <typename T>
const T* checked(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape) {
    return tensor.has_value() ? checked<T>(name, *tensor, shape) : nullptr;
}

// The layout of response arrays shaped as `response_mask`; rows equal tokens until with_hidden says otherwise.
Layout layout_of(const at::Tensor& response_mask, const OptionalTensor& cu_seqlens);

// Everything of visual_focus but the response mask; fills in the rows of `layout`.
FocusInput focus_input(const at::Tensor& hidden, const OptionalTensor& visual_mask, Layout& layout,
                       const OptionalTensor& prototype, const OptionalTensor& prototype_index);

WeightsConfig config_of(at::ArrayRef<double> fields);
LossOptions options_of(at::ArrayRef<double> fields);

// Everything of the policy loss but the factors.
LossInput loss_input(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                     const at::Tensor& response_mask, const Layout& layout, const OptionalTensor& ref_logp,
                     const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                     const OptionalTensor& num_tokens, const OptionalTensor& num_sequences);

// What a loss operator returns: loss, its gradients by logp and (no elements without entropy) entropy, metrics.
using LossTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LossTensors empty_loss(const at::Tensor& logp, const OptionalTensor& entropy, int64_t metrics);
LossOutput loss_output(const LossTensors& tensors);

}  // namespace vgpo
