#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace vgpo {
namespace {

bool runs_here(const Kernels* table) {
    if (table == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
    // The compiler's runtime also asks whether the operating system saves the wide registers.
    if (table == avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (table == avx512_kernels) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return table == portable_kernels;
}

struct Available {
    const Kernels* tables[4] = {};
    int count = 0;

    Available() {
        for (const Kernels* table : {portable_kernels, avx2_kernels, avx512_kernels}) {
            if (runs_here(table)) tables[count++] = table;
        }
    }

    const Kernels* named(const char* name) const {
        for (int i = 0; i < count; ++i) {
            if (std::strcmp(tables[i]->name, name) == 0) return tables[i];
        }
        return nullptr;
    }
};

const Available& available() {
    static const Available found;
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> table = [] {
        const char* name = std::getenv("VGPO_SIMD");
        const Kernels* wanted = name == nullptr ? nullptr : available().named(name);
        return wanted != nullptr ? wanted : available().tables[available().count - 1];
    }();
    return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const Kernels* const* available_kernels() { return available().tables; }

bool choose_kernels(const char* name) {
    const Kernels* wanted = available().named(name);
    if (wanted != nullptr) chosen().store(wanted, std::memory_order_relaxed);
    return wanted != nullptr;
}

}  // namespace vgpo
