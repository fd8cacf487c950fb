// The emulated GPU: a grid of blocks of fibers, their barriers, warp exchanges and shared memory.
//
// One operating-system thread runs everything. A fiber runs until it must wait (for a barrier, for the other lanes of
// a warp operation, for the grid) and then hands over to the first ready fiber of its block in the launch's order:
// forward, backward, or in a seeded shuffle of warps and of the lanes within. The first warp of the order thus runs as
// far ahead of the others as the kernel's barriers let it; interleaved, all threads advance together instead. A kernel
// that lacks a barrier computes different results in different orders.
//
// The blocks of a cooperative launch, or of a cluster, are there together: one runs until none of its threads can go
// on.
#pragma once

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
#include "shared_segment.h"
#include "warpgroup.h"

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
    unsigned cluster = 1;  // blocks
    Order order = Order::kForward;
    uint64_t seed = 0;
};

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kAtGrid, kAtCluster, kAtPhase, kInWarpgroup, kDone };
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
    bool unpublished_copies = false;  // products may not see some that have come
    unsigned phases = 0;   // address of the barrier in shared memory of which it waits for a phase
    ThreadProducts products;
};

struct Block {
    Index3 index;
    std::vector<Fiber> fibers;
    std::vector<uint32_t> order;          // of threads
    std::vector<uint32_t> place;          // of a thread in `order`
    std::vector<unsigned> waiting_lanes;  // of each warp: who waits in a warp operation
    std::vector<unsigned char> shared;    // static shared memory, while another block runs
    std::unique_ptr<GuardedBuffer> dynamic_shared;
    std::vector<Warpgroup> warpgroups;
    std::vector<unsigned> unpublished;  // barriers in shared memory that copies and other blocks may not know yet
    size_t cursor = 0;                  // place from which to look for a ready thread
    size_t at_barrier = 0;
    size_t done = 0;
};

// A copy that is on its way to a block, and will count at a barrier there.
struct Delivery {
    Block* block;
    unsigned barrier;  // its address
    Site site;         // where it began
    std::function<void()> arrive;
};

class Machine {
   public:
    static constexpr unsigned kDynamicBegin = 1040, kStaticBegin = 1u << 20, kNowhere = ~0u;

    // Runs a launch; returns an empty string, or what went wrong.
    std::string run(const Launch& launch, std::function<void()> kernel) {
        launch_ = launch;
        kernel_ = std::move(kernel);
        error_.clear();
        segment_ = shared_segment();
        random_.seed(launch.seed);
        deliveries_.clear();
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
        wait(State::kAtGrid, site);
    }

    // Lets others run until something makes this thread ready: wake(), or that all have come to the same state.
    void wait(State state, Site site) {
        current_->site = site;
        current_->state = state;
        hand_over();
    }

    void wake(Fiber& fiber) {
        Block& block = *fiber.block;
        fiber.state = State::kReady;
        if (launch_.order == Order::kInterleaved) return;
        block.cursor = std::min<size_t>(block.cursor, block.place[static_cast<size_t>(&fiber - block.fibers.data())]);
    }

    // Blocks of the running thread's cluster.
    Block& block_of_cluster(unsigned rank) { return blocks_[rank]; }

    // What lies in shared memory has the same address in every block. That of dynamic shared memory is as unaligned as
    // a GPU's may be.
    unsigned shared_address(const void* pointer) {
        const auto* at = static_cast<const unsigned char*>(pointer);
        const unsigned char* dynamic = current_->block->dynamic_shared->data();
        if (segment_.begin <= at && at < segment_.begin + segment_.bytes) {
            return kStaticBegin + static_cast<unsigned>(at - segment_.begin);
        }
        if (dynamic <= at && at <= dynamic + launch_.dynamic_shared_bytes) {
            return kDynamicBegin + static_cast<unsigned>(at - dynamic);
        }
        return kNowhere;
    }

    // So many bytes of a block's shared memory, or null where they are not there.
    unsigned char* shared_at(Block& block, unsigned address, size_t bytes) {
        const size_t of_static = address - kStaticBegin, of_dynamic = address - kDynamicBegin;
        if (address >= kStaticBegin && of_static + bytes <= segment_.bytes) {
            return (running_ == &block ? segment_.begin : block.shared.data()) + of_static;
        }
        if (address >= kDynamicBegin && of_dynamic + bytes <= launch_.dynamic_shared_bytes) {
            return block.dynamic_shared->data() + of_dynamic;
        }
        return nullptr;
    }

    // Copies arrive when nobody can go on without them, interleaved at once, and shuffled at any time until then.
    void send(const Delivery& delivery) {
        deliveries_.push_back(delivery);
        if (launch_.order == Order::kInterleaved) deliver(deliveries_.size() - 1);
    }
    bool by_chance() { return launch_.order == Order::kShuffled && random_() % 2 == 0; }
    void deliver_by_chance() {
        if (!deliveries_.empty() && by_chance()) deliver(random_() % deliveries_.size());
    }

    // Ends the launch with an error; does not return to a thread.
    void fail(const std::string& what, Site site) {
        if (!error_.empty()) return;
        std::ostringstream message;
        message << what << " (" << site.file << ":" << site.line << ") " << describe(current_);
        error_ = message.str();
        if (current_ != nullptr) switch_context(current_->context, scheduler_);
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
        const size_t blocks = launch_.grid.volume(), together = launch_.cooperative ? blocks : launch_.cluster;
        if (blocks % together != 0) {
            error_ = "the grid is no whole number of clusters";
            return;
        }
        blocks_.resize(together);
        for (const uint32_t group : ordered(blocks / together)) {
            running_ = nullptr;
            for (size_t i = 0; i < together; ++i) {
                const auto index = static_cast<uint32_t>(group * together + i);
                start(blocks_[i], index, i * launch_.block.volume());
            }
            block_order_ = ordered(together);
            run_together();
            if (!error_.empty()) return;
        }
    }

    void run_together() {
        while (error_.empty()) {
            bool ran = false;
            for (const uint32_t index : block_order_) {
                Block& block = blocks_[index];
                if (next_ready(block) == nullptr) continue;
                ran = true;
                bring_in(block);
                resume(block);
                if (!error_.empty()) return;
            }
            if (ran) continue;  // a block may have let another one go on
            const auto ended = [](const Block& block) { return block.done == block.fibers.size(); };
            if (std::all_of(blocks_.begin(), blocks_.end(), ended)) return check_ends();
            if (release_all(State::kAtCluster)) continue;
            if (release_all(State::kAtGrid)) {
                block_order_ = ordered(blocks_.size());
                continue;
            }
            if (!deliver_awaited()) report_deadlock();
        }
    }

    // Lets the threads of all blocks go on, if all of them wait in this state. A cluster does not wait for threads that
    // have exited.
    bool release_all(State state) {
        const Fiber* first = nullptr;
        for (const Block& block : blocks_) {
            for (const Fiber& fiber : block.fibers) {
                if (fiber.state == State::kDone && state == State::kAtCluster) continue;
                if (fiber.state != state) return false;
                if (first == nullptr) first = &fiber;
                if (fiber.site == first->site || state == State::kAtGrid) continue;
                fail("divergent barriers of a cluster: others wait at line " + std::to_string(first->site.line),
                     fiber.site);
                return true;
            }
        }
        for (Block& block : blocks_) {
            for (Fiber& fiber : block.fibers) {
                if (fiber.state == state) wake(fiber);
            }
        }
        return true;
    }

    void check_ends() {
        const auto waiting = [](const Warpgroup& warpgroup) { return !warpgroup.sums.empty(); };
        for (const Block& block : blocks_) {
            const auto& groups = block.warpgroups;
            if (std::any_of(groups.begin(), groups.end(), waiting)) error_ = "a block ends with products on their way";
        }
        if (!deliveries_.empty()) fail("a block ends with a copy to it on its way", deliveries_[0].site);
    }

    void deliver(size_t place) {
        const Delivery delivery = deliveries_[place];
        deliveries_.erase(deliveries_.begin() + static_cast<std::ptrdiff_t>(place));
        if (delivery.block->done == delivery.block->fibers.size()) {
            return fail("a copy arrives at a block that has ended", delivery.site);
        }
        delivery.arrive();
    }

    // The oldest copy that a thread waits for, shuffled any of them.
    bool deliver_awaited() {
        std::vector<size_t> awaited;
        for (size_t i = 0; i < deliveries_.size(); ++i) {
            const Delivery& delivery = deliveries_[i];
            const auto waits = [&](const Fiber& fiber) {
                return fiber.state == State::kAtPhase && fiber.phases == delivery.barrier;
            };
            const std::vector<Fiber>& fibers = delivery.block->fibers;
            if (std::any_of(fibers.begin(), fibers.end(), waits)) awaited.push_back(i);
        }
        if (awaited.empty()) return false;
        deliver(awaited[launch_.order == Order::kShuffled ? random_() % awaited.size() : 0]);
        return true;
    }

    // Puts a block's static shared memory where its threads find it.
    void bring_in(Block& block) {
        if (running_ == &block) return;
        if (running_ != nullptr) std::memcpy(running_->shared.data(), segment_.begin, segment_.bytes);
        std::memcpy(segment_.begin, block.shared.data(), segment_.bytes);
        running_ = &block;
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
        block.at_barrier = block.done = block.cursor = 0;
        block.warpgroups.clear();
        block.warpgroups.resize((threads + kWarpgroup - 1) / kWarpgroup);
        block.unpublished.clear();
        // All bytes 0xff: NaN in every float type, -1 in every integer type.
        block.shared.assign(segment_.bytes, 0xff);
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
        current_ = nullptr;
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
            wake(lanes[lane]);
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

    // Of a grid's blocks one is named, of a cluster's all.
    void report_deadlock() {
        const auto all = [](const Block& block, State state) {
            return std::all_of(block.fibers.begin(), block.fibers.end(),
                               [&](const Fiber& fiber) { return fiber.state == state; });
        };
        for (const uint32_t index : block_order_) {
            const Block& block = blocks_[index];
            if (all(block, State::kDone) || all(block, State::kAtGrid)) continue;
            error_ += (error_.empty() ? "" : " ") + describe_waiting(block);
            if (launch_.cluster == 1) return;
        }
        if (error_.empty()) error_ = "deadlock: blocks wait for the grid while others have exited";
    }

    static std::string describe_waiting(const Block& block) {
        std::ostringstream message;
        message << "deadlock in block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << "):";
        const std::pair<State, const char*> states[] = {
            {State::kAtBarrier, "at __syncthreads"},
            {State::kInWarp, "in a warp operation"},
            {State::kAtGrid, "at the grid barrier"},
            {State::kAtCluster, "at the cluster's barrier"},
            {State::kAtPhase, "waiting for a phase"},
            {State::kInWarpgroup, "waiting for the other threads of a product"},
            {State::kDone, "exited"},
        };
        for (const auto& [state, name] : states) {
            size_t count = 0;
            Site site;
            for (const Fiber& fiber : block.fibers) {
                if (fiber.state != state) continue;
                ++count;
                site = fiber.site;
            }
            if (count == 0) continue;
            message << " " << count << " threads " << name;
            if (state != State::kDone) message << " (" << site.file << ":" << site.line << ")";
            message << ";";
        }
        return message.str();
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
    std::vector<Delivery> deliveries_;
    std::mt19937_64 random_;
    Block* running_ = nullptr;  // whose static shared memory lies in the segment
    Context scheduler_;
    Fiber* current_ = nullptr;
};

inline Machine& machine() { return Machine::instance(); }

inline std::string launch(const Launch& shape, std::function<void()> kernel) {
    return machine().run(shape, std::move(kernel));
}

}  // namespace emulation
