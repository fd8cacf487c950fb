#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace vgpo {
namespace {

#ifdef __aarch64__
// FEAT_BF16, as the operating system tells it.
bool has_bfmmla() {
#if defined(__linux__)
    constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
    return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;
#endif
}
#endif

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
#ifdef __aarch64__
    if (table == neon_kernels) return true;
    if (table == neon_bf16_kernels) return has_bfmmla();
#endif
    return table == portable_kernels;
}

struct Available {
    const Kernels* tables[6] = {};  // a null behind the last
    int count = 0;

    Available() {
        for (const Kernels* table : {portable_kernels, avx2_kernels, avx512_kernels, neon_kernels, neon_bf16_kernels}) {
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
