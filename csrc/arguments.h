// Reads the arguments of operators by the names of their schema, which Python defines, for CPU and CUDA alike. The
// public functions have checked them; what is asked again here keeps a direct call of an operator from reading outside
// its arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <vector>

#include "inputs.h"
#include "logit_map.h"
#include "shaping_math.h"

namespace vgpo {

// What an operator returns, in the schema's order.
using Tensors = std::vector<at::Tensor>;

// What a loss operator returns, and the same as raw pointers.
struct LossResult {
    Tensors tensors;
    LossOutput output;
};

// Whether the values of boundaries and indices are looked at. On a GPU that would synchronise; its kernels clamp them
// into the arrays instead.
enum class Values { kChecked, kClamped };

// The arguments of one call. A name that the schema does not have raises, and so does an argument that nobody has read
// when the operator returns.
class ArgumentReader {
public:
    // Every tensor must be on the device of the first.
    ArgumentReader(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments, Values values);

    c10::Device device() const { return device_; }

    // Whether an optional argument is given.
    bool has(const char* name) const { return !argument(name).isNone(); }
    // A number or a flag: double, int64_t or bool.
    template <typename T>
    T value(const char* name) const {
        return argument(name).to<T>();
    }
    // Marks as read what an operator does not need.
    void ignore(const char* name) const { argument(name); }
    // A tensor, unchecked.
    const at::Tensor& tensor(const char* name) const { return argument(name).toTensor(); }
    at::IntArrayRef shape(const char* name) const { return tensor(name).sizes(); }

    // The data of a contiguous tensor of type T and the given shape; null for a tensor that is absent.
    template <typename T>
    const T* data(const char* name, at::IntArrayRef shape) const {
        const c10::IValue& given = argument(name);
        if (given.isNone()) return nullptr;
        check_contiguous(name, given.toTensor(), c10::CppTypeToScalarType<T>::value, shape);
        return given.toTensor().const_data_ptr<T>();
    }

    // The data of an fp32 matrix whose rows are contiguous, with any stride between them.
    float* rows(const char* name, int64_t rows, int64_t columns) const;
    // The same of one that the operator writes to: its rows must not overlap.
    float* written_rows(const char* name, int64_t rows, int64_t columns) const;

    HiddenType type(const char* name) const;

    // The layout of response arrays shaped as a mask, with as many rows as tokens. `hidden` and `focus` give it the
    // rows of hidden states.
    Layout layout(const char* mask) const;

    // Hidden states and the visual mask.
    FocusTensors hidden(const Layout& layout) const;
    // The same and given prototypes.
    FocusTensors focus(const Layout& layout) const;

    WeightsConfig config() const;
    ShapingConfig shaping() const;

    // How the products of an LM head's rows become logits.
    LogitMaps logit_maps(int64_t rows) const;

    LossInput loss(const Layout& layout) const;
    LossResult empty_loss(int64_t metrics) const;

    AttentionTensors attention(int64_t num_segments) const;

    void check_all_read() const;

private:
    const c10::IValue& argument(const char* name) const;
    void check_contiguous(const char* name, const at::Tensor& tensor, at::ScalarType type,
                          at::IntArrayRef shape) const;
    const int64_t* boundaries(const char* name, int64_t length) const;
    template <typename Settings>
    Settings settings(const char* name) const;
    SpreadInput spread(const char* name, at::IntArrayRef shape, const Layout& layout) const;
    Heads heads(const char* name, const char* boundaries_name) const;

    const c10::FunctionSchema& schema_;
    at::ArrayRef<c10::IValue> arguments_;
    c10::Device device_;
    Values values_;
    mutable uint64_t read_ = 0;  // a bit per argument
};

using Operation = Tensors (*)(const ArgumentReader& reader);

// Takes the arguments of an operation off torch's stack and puts its results there.
void call(Operation operation, Values values, const c10::FunctionSchema& schema, torch::jit::Stack& stack);

template <Operation operation, Values values>
void call_boxed(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
    call(operation, values, handle.schema(), *stack);
}

// An operation as TORCH_LIBRARY_IMPL registers it. No order of arguments is written down in C++: torch passes them in a
// list, and the schema names them.
template <Operation operation, Values values>
torch::CppFunction by_name() {
    return torch::CppFunction::makeFromBoxedFunction<&call_boxed<operation, values>>();
}

}  // namespace vgpo
