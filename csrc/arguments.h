// Reads the arguments of operators, for CPU and CUDA alike. The public functions have checked them; what is asked again
// here keeps a direct call of an operator from reading outside its arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <tuple>

#include "inputs.h"

namespace vgpo {

using OptionalTensor = std::optional<at::Tensor>;

// Whether the values of boundaries and indices are looked at. On a GPU that would synchronise; its kernels clamp them
// into the arrays instead.
enum class Values { kChecked, kClamped };

class ArgumentReader {
public:
    // Every tensor must be on `device`.
    ArgumentReader(c10::Device device, Values values) : device_(device), values_(values) {}

    c10::Device device() const { return device_; }

    // The data of a contiguous tensor of type T and the given shape; null for a tensor that is absent.
    template <typename T>
    const T* tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) const {
        check_contiguous(name, tensor, c10::CppTypeToScalarType<T>::value, shape);
        return tensor.const_data_ptr<T>();
    }
    template <typename T>
    const T* tensor(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape) const {
        return tensor.has_value() ? this->tensor<T>(name, *tensor, shape) : nullptr;
    }

    // The data of an fp32 matrix whose rows are contiguous, with any stride between them.
    float* rows(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns) const;

    HiddenType type(const char* name, const at::Tensor& tensor) const;

    // The layout of response arrays shaped as `mask`, with as many rows as tokens. `focus` gives it the rows of hidden
    // states.
    Layout layout(const at::Tensor& mask, const OptionalTensor& cu_seqlens) const;

    FocusTensors focus(const at::Tensor& hidden, const OptionalTensor& visual_mask, const Layout& layout,
                     const OptionalTensor& prototype, const OptionalTensor& prototype_index) const;

    WeightsConfig config(at::ArrayRef<double> numbers) const;

    LossInput loss(const at::Tensor& logp, const at::Tensor& old_logp, const at::Tensor& advantages,
                   const at::Tensor& response_mask, const Layout& layout, const OptionalTensor& ref_logp,
                   const OptionalTensor& entropy, const OptionalTensor& importance_weights,
                   const OptionalTensor& num_tokens, const OptionalTensor& num_sequences,
                   at::ArrayRef<double> options) const;

    AttentionTensors attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& key_segments,
                             const OptionalTensor& query_positions, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, int64_t num_segments, double scale,
                             int64_t window) const;

private:
    void check_contiguous(const char* name, const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef shape) const;
    const int64_t* boundaries(const char* name, const at::Tensor& cu_seqlens, int64_t length) const;
    SpreadInput spread(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const Layout& layout) const;
    Heads heads(const char* name, const at::Tensor& tensor, const char* boundaries_name,
                     const OptionalTensor& cu_seqlens) const;

    c10::Device device_;
    Values values_;
};

// What a loss operator returns: loss, its gradients w.r.t. logp and entropy (no elements without entropy), metrics.
using LossTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LossTensors empty_loss(const at::Tensor& logp, const OptionalTensor& entropy, int64_t metrics);
LossOutput loss_output(const LossTensors& tensors, const OptionalTensor& entropy);

}  // namespace vgpo
