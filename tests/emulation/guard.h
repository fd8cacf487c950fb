// Memory that catches an index out of range, and a trap that turns a fault into a message.
//
// A guarded buffer touches an inaccessible page at its end (or at its begin): the first byte beyond faults, for reads
// and writes alike. Together with the compiler's own checks of array bounds, alignment and casts (which raise SIGILL),
// this finds what compute-sanitizer's memcheck finds on a GPU.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulation {

enum class Guard { kAfter, kBefore };

class GuardedBuffer {
   public:
    // `kAfter` puts the last byte against the guard page, `kBefore` the first. The other end has a guard page as well,
    // with slack of less than a page before it. Contents are poisoned: all bytes 0xff.
    GuardedBuffer(std::string name, size_t bytes, Guard guard) : name_(std::move(name)), bytes_(bytes) {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t body = (bytes + page - 1) / page * page;
        mapped_ = body + 2 * page;
        void* mapping = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapping == MAP_FAILED) throw std::runtime_error("no memory for a guarded buffer");
        mapping_ = static_cast<unsigned char*>(mapping);
        if (body > 0) mprotect(mapping_ + page, body, PROT_READ | PROT_WRITE);
        data_ = mapping_ + page + (guard == Guard::kAfter ? body - bytes : 0);
        std::memset(data_, 0xff, bytes);
        registry().push_back(this);
    }

    ~GuardedBuffer() {
        auto& all = registry();
        for (size_t i = 0; i < all.size(); ++i) {
            if (all[i] != this) continue;
            all[i] = all.back();
            all.pop_back();
            break;
        }
        munmap(mapping_, mapped_);
    }

    GuardedBuffer(const GuardedBuffer&) = delete;
    GuardedBuffer& operator=(const GuardedBuffer&) = delete;

    unsigned char* data() const { return data_; }

    // From here on a write faults.
    void protect() {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        if (mapped_ > 2 * page) mprotect(mapping_ + page, mapped_ - 2 * page, PROT_READ);
    }

    // Names the buffer whose guard `address` lies in, and how far off it is.
    static std::string blame(const void* address) {
        const auto* at = static_cast<const unsigned char*>(address);
        std::ostringstream message;
        for (const GuardedBuffer* buffer : registry()) {
            if (at < buffer->mapping_ || at >= buffer->mapping_ + buffer->mapped_) continue;
            const unsigned char *begin = buffer->data_, *end = begin + buffer->bytes_;
            if (at < begin) message << begin - at << " bytes before the begin of ";
            else if (at >= end) message << at - end << " bytes past the end of ";
            else message << "a write to ";
            message << buffer->name_;
            return message.str();
        }
        message << "address " << address << ", which no buffer owns";
        return message.str();
    }

   private:
    static std::vector<const GuardedBuffer*>& registry() {
        static std::vector<const GuardedBuffer*> buffers;
        return buffers;
    }

    std::string name_;
    size_t bytes_;
    unsigned char* mapping_;
    unsigned char* data_;
    size_t mapped_;
};

// How a call guards its memory, while it lasts.
struct Guarding {
    Guard side = Guard::kAfter;
    bool apart = false;  // every array of a workspace in a buffer of its own
    std::vector<std::unique_ptr<GuardedBuffer>> arrays;
};

inline Guarding& guarding() {
    static Guarding current;
    return current;
}

// An array of a workspace in a buffer of its own, until the call ends; null where the call does not ask for that.
inline void* take_apart(const char* name, size_t bytes) {
    Guarding& current = guarding();
    if (!current.apart) return nullptr;
    current.arrays.push_back(std::make_unique<GuardedBuffer>(name, bytes, current.side));
    return current.arrays.back()->data();
}

struct FaultTrap {
    sigjmp_buf resume;
    volatile int signal = 0;
    void* volatile address = nullptr;
};

inline FaultTrap& fault_trap() {
    static FaultTrap trap;
    return trap;
}

inline void on_fault(int signal, siginfo_t* information, void*) {
    fault_trap().signal = signal;
    fault_trap().address = information->si_addr;
    siglongjmp(fault_trap().resume, 1);
}

// Runs `body`; returns 0, or the signal that ended it. The stacks that a fault abandons are not unwound: what `body`
// owns is lost.
__attribute__((noinline)) inline int run_until_fault(const std::function<void()>& body) {
    if (sigsetjmp(fault_trap().resume, 1) != 0) return fault_trap().signal;
    body();
    return 0;
}

// Runs `body`; returns an empty string, or the fault that ended it.
inline std::string trap_faults(const std::function<void()>& body) {
    constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    static unsigned char handler_stack[64 * 1024];  // a fiber that overflowed its stack has none left to offer
    stack_t alternative{}, previous_stack{};
    alternative.ss_sp = handler_stack;
    alternative.ss_size = sizeof handler_stack;
    sigaltstack(&alternative, &previous_stack);
    struct sigaction action {}, previous[4];
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &previous[i]);
    const int signal = run_until_fault(body);
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &previous[i], nullptr);
    sigaltstack(&previous_stack, nullptr);
    switch (signal) {
        case 0: return "";
        case SIGILL: return "undefined behaviour: an index, alignment, shift or cast that the language forbids,";
        case SIGFPE: return "integer division by zero";
        default: return "out-of-range access, " + GuardedBuffer::blame(fault_trap().address) + ",";
    }
}

}  // namespace emulation
