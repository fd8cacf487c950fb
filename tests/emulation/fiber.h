// Fibers: stacks that a single operating-system thread switches between, one for each emulated CUDA thread.
//
// A switch saves the callee-saved registers and the stack pointer; on x86-64 and AArch64 that is a dozen
// instructions, elsewhere ucontext does it (correct, but with a system call each time).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define EMULATION_UCONTEXT 1
#endif

namespace emulation {

using FiberEntry = void (*)();

#if defined(EMULATION_UCONTEXT)

struct Context {
    ucontext_t state;
};

inline void prepare(Context& context, unsigned char* stack, size_t bytes, FiberEntry entry) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void emulation_switch(void** save_stack_pointer, void* stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.align 16
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr size_t kFrameWords = 7;  // six registers, and the entry point that `ret` takes
constexpr size_t kEntryWord = 6;
constexpr size_t kHeadroomWords = 3;  // leaves the stack pointer 8 bytes off alignment, as a call does
#else
asm(R"(
.text
.align 4
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr size_t kFrameWords = 20;
constexpr size_t kEntryWord = 11;  // x30, the link register
constexpr size_t kHeadroomWords = 2;
#endif

inline void prepare(Context& context, unsigned char* stack, size_t bytes, FiberEntry entry) {
    auto* end = reinterpret_cast<uint64_t*>(stack + bytes);
    uint64_t* frame = end - kHeadroomWords - kFrameWords;
    for (uint64_t* word = frame; word < end; ++word) *word = 0;
    frame[kEntryWord] = reinterpret_cast<uint64_t>(entry);
    context.stack_pointer = frame;
}

inline void switch_context(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }

#endif

// Stacks for any number of fibers, kept between launches. Below each lies a page that faults on overflow.
class Stacks {
   public:
    static constexpr size_t kBytes = 64 * 1024;

    ~Stacks() {
        for (void* mapping : mappings_) munmap(mapping, slot_bytes());
    }

    unsigned char* at(size_t index) {
        while (mappings_.size() <= index) {
            void* mapping = mmap(nullptr, slot_bytes(), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (mapping == MAP_FAILED) throw std::runtime_error("no memory for the stack of an emulated thread");
            mprotect(mapping, page_bytes(), PROT_NONE);
            mappings_.push_back(mapping);
        }
        return static_cast<unsigned char*>(mappings_[index]) + page_bytes();
    }

   private:
    static size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
    static size_t slot_bytes() { return kBytes + page_bytes(); }

    std::vector<void*> mappings_;
};

}  // namespace emulation
