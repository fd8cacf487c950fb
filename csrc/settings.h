// Settings travel to operators as numbers (as_floats in vgpo_kernels/config.py). Here they are read, field by field, in
// the order in which WeightsConfig and LossOptions ask for them. Nothing here includes a torch header.
#pragma once

#include <cmath>
#include <cstddef>
#include <sstream>
#include <string>
#include <vector>

namespace vgpo {

// Reads numbers from the first to the last. A code chooses an enumerator and a ratio becomes an index: neither may be
// anything else, NaN included. The first mistake is kept, and the caller raises it.
class SettingsReader {
public:
    // A field that was read: a test compares them with those of vgpo_kernels/config.py.
    struct Field {
        const char* name;
        const char* kind;
        int choices;  // of a code
    };

    // `fields`, if given, gets every field that is read.
    SettingsReader(const double* numbers, size_t count, std::vector<Field>* fields = nullptr)
        : numbers_(numbers), count_(count), fields_(fields) {}

    template <typename T>
    void number(const char* name, T& field) {
        const double value = begin({name, "number", 0});
        field = static_cast<T>(value);
        expect(std::isfinite(field), "finite, as a number of the kernels", value);
    }
    // A number that may be missing: infinity, NaN or zero stand for that, as the field says.
    template <typename T>
    void optional(const char* name, T& field) {
        const double value = begin({name, "optional", 0});
        field = static_cast<T>(value);
        expect(std::isfinite(field) || !std::isfinite(value), "a number of the kernels", value);
    }
    template <typename T>
    void ratio(const char* name, T& field) {
        const double value = begin({name, "ratio", 0});
        expect(0.0 <= value && value <= 1.0, "in [0, 1]", value);
        field = static_cast<T>(value);
    }
    void flag(const char* name, bool& field) {
        const double value = begin({name, "flag", 0});
        expect(value == 0.0 || value == 1.0, "0 or 1", value);
        field = value == 1.0;
    }
    template <typename T>
    void code(const char* name, T& field) {
        constexpr int kChoices = static_cast<int>(T::kCount);
        const double value = begin({name, "code", kChoices});
        const bool known = 0.0 <= value && value < kChoices;
        expect(known, "the code of a choice", value);
        field = static_cast<T>(known ? static_cast<int>(value) : 0);
    }
    template <typename T>
    void bounds(const char* name, T& low, T& high) {
        const double first = begin({name, "bounds", 0}), second = next();
        expect(first <= second, "two numbers, the lower one first", first);
        low = static_cast<T>(first);
        high = static_cast<T>(second);
    }

    // What is wrong with `settings`, all of whose fields have been read; empty if nothing is.
    std::string complaint(const char* settings) const {
        if (read_ == count_) return complaint_;
        std::ostringstream message;
        message << settings << " must have " << read_ << " numbers, got " << count_;
        return message.str();
    }

private:
    double begin(const Field& field) {
        name_ = field.name;
        if (fields_ != nullptr) fields_->push_back(field);
        return next();
    }

    double next() {
        const size_t index = read_++;
        return index < count_ ? numbers_[index] : 0.0;
    }

    void expect(bool valid, const char* expected, double value) {
        if (valid || !complaint_.empty()) return;
        std::ostringstream message;
        message << name_ << " must be " << expected << ", got " << value;
        complaint_ = message.str();
    }

    const double* numbers_;
    size_t count_, read_ = 0;
    std::vector<Field>* fields_;
    const char* name_ = "";  // of the field being read
    std::string complaint_;
};

}  // namespace vgpo
