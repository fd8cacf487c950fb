// The emulated GPU: a grid of blocks of fibers, their barriers, warp exchanges and shared memory.
//
// One operating-system thread runs everything. A fiber runs until it must wait (for a barrier, for the other lanes of
// a warp operation, for the grid) and then hands over to the first ready fiber of its block in the launch's order:
// forward, backward, or in a seeded shuffle of warps and of the lanes within. The first warp of the order thus runs as
// far ahead of the others as the kernel's barriers let it; interleaved, all threads advance together instead. A kernel
// that lacks a barrier computes different results in different orders.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fiber.h"
#include "guard.h"

namespace emulation {

struct Index3 {
    unsigned x = 1, y = 1, z = 1;
    size_t volume() const { return static_cast<size_t>(x) * y * z; }
};

enum class Order { kForward, kReverse, kShuffled, kInterleaved };

struct Launch {
    Index3 grid;
    Index3 block;
    size_t dynamic_shared_bytes = 0;
    bool cooperative = false;
    Order order = Order::kForward;
    uint64_t seed = 0;
};

// Where a synchronisation stands in the source: threads that meet must meet at the same place.
struct Site {
    const char* file = nullptr;
    int line = 0;
    bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kAtGrid, kDone };
enum class Exchange : uint8_t { kSync, kShuffle, kBallot, kMatch, kAdd, kMin, kMax };

constexpr int kWarp = 32;

struct Block;

// An asynchronous copy to shared memory that a thread has started, and may not have waited for.
struct AsyncCopy {
    void* to;
    const void* from;
    size_t bytes;
    size_t group;  // committed by the thread's call of this number
};

struct Fiber {
    Context context;
    State state = State::kReady;
    Index3 thread;
    int lane = 0;
    Block* block = nullptr;
    Site site;
    // The warp operation or barrier it takes part in: what it brings, and what it gets.
    Exchange exchange = Exchange::kSync;
    unsigned mask = 0;
    int source = 0;
    uint64_t payload = 0;
    uint64_t result = 0;
    std::vector<AsyncCopy> copies;
    size_t committed = 0;  // groups of them
};

struct Block {
    Index3 index;
    std::vector<Fiber> fibers;
    std::vector<uint32_t> order;          // of threads
    std::vector<uint32_t> place;          // of a thread in `order`
    std::vector<unsigned> waiting_lanes;  // of each warp: who waits in a warp operation
    std::vector<unsigned char> shared;    // static shared memory, while another block runs
    std::unique_ptr<GuardedBuffer> dynamic_shared;
    size_t cursor = 0;  // place from which to look for a ready thread
    size_t at_barrier = 0;
    size_t at_grid = 0;
    size_t done = 0;
};

// Static shared memory is `thread_local` data of this shared object, so that it also works in templates; with a single
// operating-system thread the segment is exactly the shared memory of the running block.
struct SharedSegment {
    unsigned char* begin = nullptr;
    size_t bytes = 0;
};

inline thread_local unsigned char shared_segment_marker;

inline SharedSegment shared_segment() {
    struct Search {
        uintptr_t marker;
        SharedSegment found;
    } search{reinterpret_cast<uintptr_t>(&shared_segment_marker), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto* wanted = static_cast<Search*>(data);
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
                if (header.p_type != PT_TLS || begin == 0) continue;
                if (wanted->marker < begin || wanted->marker >= begin + header.p_memsz) continue;
                wanted->found = {static_cast<unsigned char*>(info->dlpi_tls_data), header.p_memsz};
                return 1;
            }
            return 0;
        },
        &search);
    return search.found;
}

class Machine {
   public:
    // Runs a launch; returns an empty string, or what went wrong.
    std::string run(const Launch& launch, std::function<void()> kernel) {
        launch_ = launch;
        kernel_ = std::move(kernel);
        error_.clear();
        segment_ = shared_segment();
        random_.seed(launch.seed);
        const std::string fault = trap_faults([this] { run_blocks(); });
        if (!fault.empty()) error_ = fault + " " + describe(current_);
        current_ = nullptr;
        kernel_ = nullptr;
        return error_;
    }

    Fiber& current() { return *current_; }
    const Launch& launch() const { return launch_; }

    void barrier(Site site, bool predicate) {
        Fiber& self = *current_;
        self.payload = predicate;
        self.site = site;
        ++self.block->at_barrier;
        self.state = State::kAtBarrier;
        if (self.block->at_barrier == self.block->fibers.size()) release_barrier(*self.block);
        hand_over();
    }

    uint64_t warp_exchange(Exchange exchange, unsigned mask, uint64_t payload, int source, Site site) {
        Fiber& self = *current_;
        if ((mask >> self.lane & 1u) == 0) fail("a lane is missing from the mask that it passes", site);
        self.exchange = exchange;
        self.mask = mask;
        self.payload = payload;
        self.source = source;
        self.site = site;
        self.state = State::kInWarp;
        const size_t first = lane_zero(self);
        unsigned& waiting = self.block->waiting_lanes[first / kWarp];
        waiting |= 1u << self.lane;
        if ((waiting & mask) == mask && same_operation(self, first)) complete(*self.block, first, mask, waiting);
        else hand_over();
        return self.result;
    }

    // The lanes of the running thread's warp.
    Fiber* warp_lanes() { return &current_->block->fibers[lane_zero(*current_)]; }

    void grid_barrier(Site site) {
        if (!launch_.cooperative) fail("grid synchronisation in a launch that is not cooperative", site);
        current_->site = site;
        current_->state = State::kAtGrid;
        ++current_->block->at_grid;
        hand_over();
    }

    // Ends the launch with an error; does not return.
    void fail(const std::string& what, Site site) {
        std::ostringstream message;
        message << what << " (" << site.file << ":" << site.line << ") " << describe(current_);
        error_ = message.str();
        switch_context(current_->context, scheduler_);
    }

   private:
    static void enter() {
        Machine& machine = instance();
        machine.kernel_();
        machine.current_->state = State::kDone;
        ++machine.current_->block->done;
        machine.hand_over();
    }

   public:
    static Machine& instance() {
        static Machine machine;
        return machine;
    }

   private:
    void run_blocks() {
        block_order_ = ordered(launch_.grid.volume());
        blocks_.resize(launch_.cooperative ? block_order_.size() : 1);
        if (launch_.cooperative) return run_together();
        Block& block = blocks_[0];
        for (size_t position = 0; position < block_order_.size() && error_.empty(); ++position) {
            start(block, block_order_[position], 0);
            poison();
            resume(block);
            if (error_.empty() && block.done != block.fibers.size()) report_deadlock(block);
        }
    }

    void run_together() {
        for (size_t i = 0; i < blocks_.size(); ++i) {
            start(blocks_[i], static_cast<uint32_t>(i), i * launch_.block.volume());
            poison();
            blocks_[i].shared.assign(segment_.begin, segment_.begin + segment_.bytes);
        }
        while (error_.empty()) {
            size_t parked = 0, finished = 0;
            for (const uint32_t index : block_order_) {
                Block& block = blocks_[index];
                std::memcpy(segment_.begin, block.shared.data(), segment_.bytes);
                resume(block);
                if (!error_.empty()) return;
                std::memcpy(block.shared.data(), segment_.begin, segment_.bytes);
                if (block.done == block.fibers.size()) ++finished;
                else if (block.at_grid == block.fibers.size()) ++parked;
                else return report_deadlock(block);
            }
            if (finished == blocks_.size()) return;
            if (parked != blocks_.size()) {
                error_ = "deadlock: blocks wait for the grid while others have exited";
                return;
            }
            for (Block& block : blocks_) {
                for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
                block.at_grid = 0;
            }
            block_order_ = ordered(blocks_.size());
        }
    }

    void start(Block& block, uint32_t index, size_t first_stack) {
        const Index3 grid = launch_.grid, shape = launch_.block;
        const size_t threads = shape.volume();
        block.index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
        block.fibers.assign(threads, Fiber());
        block.waiting_lanes.assign((threads + kWarp - 1) / kWarp, 0u);
        block.order = ordered_threads(threads);
        block.place.resize(threads);
        for (size_t i = 0; i < threads; ++i) block.place[block.order[i]] = static_cast<uint32_t>(i);
        block.at_barrier = block.at_grid = block.done = 0;
        block.dynamic_shared = std::make_unique<GuardedBuffer>("dynamic shared memory", launch_.dynamic_shared_bytes,
                                                               Guard::kAfter);
        for (size_t i = 0; i < threads; ++i) {
            Fiber& fiber = block.fibers[i];
            const auto linear = static_cast<unsigned>(i);
            fiber.thread = {linear % shape.x, linear / shape.x % shape.y, linear / shape.x / shape.y};
            fiber.lane = static_cast<int>(i % kWarp);
            fiber.block = &block;
            prepare(fiber.context, stacks_.at(first_stack + i), Stacks::kBytes, &Machine::enter);
        }
    }

    // All bytes 0xff: NaN in every float type, -1 in every integer type.
    void poison() { std::memset(segment_.begin, 0xff, segment_.bytes); }

    std::vector<uint32_t> ordered(size_t count) {
        std::vector<uint32_t> order(count);
        std::iota(order.begin(), order.end(), 0u);
        if (launch_.order == Order::kReverse) std::reverse(order.begin(), order.end());
        if (launch_.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
        return order;
    }

    std::vector<uint32_t> ordered_threads(size_t count) {
        std::vector<uint32_t> order;
        for (const uint32_t warp : ordered((count + kWarp - 1) / kWarp)) {
            for (const uint32_t lane : ordered(kWarp)) {
                if (warp * kWarp + lane < count) order.push_back(warp * kWarp + lane);
            }
        }
        return order;
    }

    // Runs a block until none of its fibers can go on.
    void resume(Block& block) {
        block.cursor = 0;
        Fiber* first = next_ready(block);
        if (first == nullptr) return;
        current_ = first;
        switch_context(scheduler_, first->context);
    }

    Fiber* next_ready(Block& block) {
        const size_t count = block.fibers.size();
        const bool interleaved = launch_.order == Order::kInterleaved;
        // Unless interleaved, the cursor is below every ready thread: it falls when one becomes ready.
        for (size_t step = 0; step < count && (interleaved || block.cursor < count); ++step) {
            if (block.cursor == count) block.cursor = 0;
            Fiber& fiber = block.fibers[block.order[block.cursor]];
            if (fiber.state == State::kReady) {
                block.cursor += interleaved;
                return &fiber;
            }
            ++block.cursor;
        }
        return nullptr;
    }

    void hand_over() {
        Fiber* self = current_;
        Fiber* next = next_ready(*self->block);
        if (next == self) return;
        if (next == nullptr) return switch_context(self->context, scheduler_);
        current_ = next;
        switch_context(self->context, next->context);
    }

    void release_barrier(Block& block) {
        uint64_t count = 0;
        for (const Fiber& fiber : block.fibers) {
            if (!(fiber.site == current_->site)) {
                std::ostringstream other;
                other << "divergent __syncthreads: others wait at " << fiber.site.file << ":" << fiber.site.line;
                fail(other.str(), current_->site);
            }
            count += fiber.payload;
        }
        for (Fiber& fiber : block.fibers) {
            fiber.state = State::kReady;
            fiber.result = count;
        }
        block.at_barrier = 0;
        block.cursor = 0;
    }

    size_t lane_zero(const Fiber& fiber) const {
        const size_t linear = static_cast<size_t>(&fiber - fiber.block->fibers.data());
        return linear / kWarp * kWarp;
    }

    bool same_operation(const Fiber& self, size_t first) const {
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((self.mask >> lane & 1u) == 0) continue;
            const Fiber& other = self.block->fibers[first + lane];
            if (other.exchange != self.exchange || other.mask != self.mask || !(other.site == self.site)) return false;
        }
        return true;
    }

    void complete(Block& block, size_t first, unsigned mask, unsigned& waiting) {
        Fiber* lanes = &block.fibers[first];
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((mask >> lane & 1u) == 0) continue;
            lanes[lane].result = result_of(lanes, lane, mask);
            lanes[lane].state = State::kReady;
            if (launch_.order != Order::kInterleaved) {
                block.cursor = std::min<size_t>(block.cursor, block.place[first + lane]);
            }
        }
        waiting &= ~mask;
    }

    uint64_t result_of(const Fiber* lanes, int lane, unsigned mask) {
        const Fiber& self = lanes[lane];
        if (self.exchange == Exchange::kShuffle) {
            if ((mask >> self.source & 1u) == 0) fail("a shuffle reads a lane outside its mask", self.site);
            return lanes[self.source].payload;
        }
        bool any = false;
        uint64_t result = 0;
        for (int other = 0; other < kWarp; ++other) {
            if ((mask >> other & 1u) == 0) continue;
            const uint64_t payload = lanes[other].payload;
            if (self.exchange == Exchange::kBallot) result |= static_cast<uint64_t>(payload != 0) << other;
            if (self.exchange == Exchange::kMatch) result |= static_cast<uint64_t>(payload == self.payload) << other;
            if (self.exchange == Exchange::kAdd) result += payload;
            if (self.exchange == Exchange::kMin) result = any ? std::min(result, payload) : payload;
            if (self.exchange == Exchange::kMax) result = std::max(result, payload);
            any = true;
        }
        return result;
    }

    void report_deadlock(const Block& block) {
        std::ostringstream message;
        message << "deadlock in block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << "):";
        const char* names[] = {"ready", "at __syncthreads", "in a warp operation", "at the grid barrier", "exited"};
        for (const State state : {State::kAtBarrier, State::kInWarp, State::kAtGrid, State::kDone}) {
            size_t count = 0;
            Site site;
            for (const Fiber& fiber : block.fibers) {
                if (fiber.state != state) continue;
                ++count;
                site = fiber.site;
            }
            if (count == 0) continue;
            message << " " << count << " threads " << names[static_cast<int>(state)];
            if (state != State::kDone) message << " (" << site.file << ":" << site.line << ")";
            message << ";";
        }
        error_ = message.str();
    }

    static std::string describe(const Fiber* fiber) {
        if (fiber == nullptr) return "";
        std::ostringstream where;
        const Index3 block = fiber->block->index, thread = fiber->thread;
        where << "in block (" << block.x << ", " << block.y << ", " << block.z << "), thread (" << thread.x << ", "
              << thread.y << ", " << thread.z << ")";
        return where.str();
    }

    Launch launch_;
    std::function<void()> kernel_;
    std::string error_;
    SharedSegment segment_;
    Stacks stacks_;
    std::vector<Block> blocks_;  // members, because a fault abandons the stack without unwinding it
    std::vector<uint32_t> block_order_;
    std::mt19937_64 random_;
    Context scheduler_;
    Fiber* current_ = nullptr;
};

inline Machine& machine() { return Machine::instance(); }

inline std::string launch(const Launch& shape, std::function<void()> kernel) {
    return machine().run(shape, std::move(kernel));
}

}  // namespace emulation
