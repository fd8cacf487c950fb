// Hopper's instructions as csrc/cuda/hopper.cuh names them: barriers with phases, copies of boxes, warpgroups' products.
// cuda_emulation.h includes this last.
//
// A copy poisons its destination when it begins, and brings its bytes as late as the launch's order lets it. A product
// reads its operands as late, and its sums are poisoned until they are waited for.
#pragma once

#include "tensor_map.h"

namespace emulation {

inline unsigned shared_address(const void* pointer) { return machine().shared_address(pointer); }

// So many bytes of a block's shared memory, if they lie there.
inline unsigned char* shared_bytes(Block& block, unsigned address, size_t bytes, Site site) {
    unsigned char* there = machine().shared_at(block, address, bytes);
    if (there == nullptr) machine().fail("an address outside shared memory", site);
    return there;
}

// ---- barriers --------------------------------------------------------------------------------------------------

// What a barrier's 64 bits mean.
struct Phases {
    unsigned arrivals;  // of every phase
    unsigned missing;   // of this one
    int bytes;          // announced, less those that have come
    bool odd;           // the phase's number

    static constexpr int kBits = 20, kMost = (1 << kBits) - 1;
};

inline uint64_t packed(const Phases& phases) {
    const auto bytes = static_cast<uint64_t>(static_cast<uint32_t>(phases.bytes) & 0x3fffffu);
    return phases.arrivals | static_cast<uint64_t>(phases.missing) << 20 | bytes << 40 |
           static_cast<uint64_t>(phases.odd) << 62;
}

// Memory that is poisoned has the last bit.
inline bool holds_phases(uint64_t word) { return word >> 63 == 0 && (word & Phases::kMost) > 0; }

inline Phases phases_of(uint64_t word) {
    const auto bytes = static_cast<int>(word >> 40 & 0x3fffffu);
    return {static_cast<unsigned>(word & Phases::kMost), static_cast<unsigned>(word >> 20 & Phases::kMost),
            bytes >= 0x200000 ? bytes - 0x400000 : bytes, (word >> 62 & 1u) != 0};
}

// Arrivals and bytes come at a barrier; the last of both end its phase.
inline void come_to(Block& block, unsigned barrier, unsigned arrivals, int bytes, Site site) {
    Machine& gpu = machine();
    unsigned char* there = shared_bytes(block, barrier, sizeof(uint64_t), site);
    if (there == nullptr) return;
    uint64_t word;
    std::memcpy(&word, there, sizeof word);
    if (!holds_phases(word)) return gpu.fail("a barrier that is not initialised", site);
    Phases phases = phases_of(word);
    if (arrivals > phases.missing) return gpu.fail("more arrivals than a phase of the barrier has", site);
    phases.missing -= arrivals;
    phases.bytes += bytes;
    if (std::abs(phases.bytes) > Phases::kMost) return gpu.fail("more bytes than a barrier counts", site);
    if (phases.missing == 0 && phases.bytes < 0) return gpu.fail("a phase gets more bytes than it was told of", site);
    if (phases.missing == 0 && phases.bytes == 0) {
        phases.missing = phases.arrivals;
        phases.odd = !phases.odd;
        for (Fiber& fiber : block.fibers) {
            if (fiber.state == State::kAtPhase && fiber.phases == barrier) gpu.wake(fiber);
        }
    }
    word = packed(phases);
    std::memcpy(there, &word, sizeof word);
}

inline unsigned barrier_address(const uint64_t* barrier, Site site) {
    const unsigned address = shared_address(barrier);
    if (address == Machine::kNowhere || address % 8 != 0) machine().fail("no place for a barrier", site);
    return address;
}

// The same for a copy, or for another block.
inline unsigned known_barrier(const uint64_t* barrier, Block& block, Site site) {
    const unsigned address = barrier_address(barrier, site);
    const auto& unknown = block.unpublished;
    if (std::find(unknown.begin(), unknown.end(), address) != unknown.end()) {
        machine().fail("a barrier that has not been published", site);
    }
    return address;
}

inline void init_barrier(uint64_t* barrier, unsigned arrivals, EMULATION_SITE) {
    const Site site{file, line};
    const unsigned address = barrier_address(barrier, site);
    if (arrivals == 0 || arrivals > Phases::kMost) machine().fail("no number of arrivals", site);
    if (holds_phases(*barrier)) machine().fail("a barrier is initialised again", site);
    *barrier = packed({arrivals, arrivals, 0, false});
    machine().current().block->unpublished.push_back(address);
}
inline void publish_barriers() { machine().current().block->unpublished.clear(); }

inline void expect_bytes(uint64_t* barrier, unsigned bytes, EMULATION_SITE) {
    const Site site{file, line};
    if (bytes > Phases::kMost) machine().fail("more bytes than a barrier counts", site);
    come_to(*machine().current().block, barrier_address(barrier, site), 1, static_cast<int>(bytes), site);
}

inline void arrive_at(uint64_t* barrier, unsigned rank, EMULATION_SITE) {
    const Site site{file, line};
    if (rank >= machine().launch().cluster) machine().fail("a block that the cluster does not have", site);
    Block& block = machine().block_of_cluster(rank);
    if (block.done == block.fibers.size()) machine().fail("an arrival at a block that has ended", site);
    come_to(block, known_barrier(barrier, block, site), 1, 0, site);
}

inline void wait_for(uint64_t* barrier, unsigned parity, EMULATION_SITE) {
    const Site site{file, line};
    Fiber& self = machine().current();
    self.phases = barrier_address(barrier, site);
    machine().deliver_by_chance();
    while (true) {
        if (!holds_phases(*barrier)) machine().fail("a barrier that is not initialised", site);
        if (phases_of(*barrier).odd != (parity != 0)) return;
        machine().wait(State::kAtPhase, site);
    }
}

inline int cluster_rank() { return static_cast<int>(machine().current().block->index.x % machine().launch().cluster); }
inline void sync_cluster(EMULATION_SITE) { machine().wait(State::kAtCluster, {file, line}); }

// ---- copies ----------------------------------------------------------------------------------------------------

// Of each 1,024 bytes the 16-byte pieces lie as eight rows of eight, piece p of row r at place p ^ r.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7u) << 4; }

// Fills a box's place in a block, with zeros where the matrix has nothing.
inline void fill_box(Block& block, unsigned to, const CUtensorMap& map, int64_t row, int64_t column) {
    constexpr int64_t kElement = CUtensorMap::kElementBytes;
    const int64_t first = std::max<int64_t>(column, 0), rows = static_cast<int64_t>(map.sizes[1]);
    const int64_t last = std::min(column + map.box[0], static_cast<int64_t>(map.sizes[0]));
    for (unsigned i = 0; i < map.box[1]; ++i) {
        unsigned char values[128] = {};
        const bool inside = row + i >= 0 && row + i < rows && first < last;
        if (inside) {
            const unsigned char* from = map.address + static_cast<uint64_t>(row + i) * map.stride + first * kElement;
            std::memcpy(values + (first - column) * kElement, from, static_cast<size_t>((last - first) * kElement));
        }
        for (unsigned piece = 0; piece < 8; ++piece) {
            const unsigned place = swizzled(to + i * 128 + piece * 16);
            std::memcpy(machine().shared_at(block, place, 16), values + piece * 16, 16);
        }
    }
}

inline void copy_box_to(uint16_t blocks, void* to, const CUtensorMap& map, int row, int column, uint64_t* barrier,
                        EMULATION_SITE) {
    const Site site{file, line};
    Machine& gpu = machine();
    const unsigned address = shared_address(to);
    if (map.known != CUtensorMap::kKnown) gpu.fail("a copy of what no map describes", site);
    if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) gpu.fail("a misaligned map", site);
    if (address % 1024 != 0) gpu.fail("a box must begin on a multiple of 1,024 bytes", site);
    if (map.box[0] * CUtensorMap::kElementBytes != 128) gpu.fail("a row of a box must have 128 bytes", site);
    if (blocks == 0 || blocks >> gpu.launch().cluster != 0) gpu.fail("blocks that the cluster does not have", site);
    const unsigned bytes = map.box[1] * 128;
    for (unsigned rank = 0; rank < gpu.launch().cluster; ++rank) {
        if ((blocks >> rank & 1) == 0) continue;
        Block* block = &gpu.block_of_cluster(rank);
        const unsigned counted = known_barrier(barrier, *block, site);
        std::memset(shared_bytes(*block, address, bytes, site), 0xff, bytes);
        gpu.send({block, counted, site, [=] {
                      fill_box(*block, address, map, row, column);
                      come_to(*block, counted, 0, -static_cast<int>(bytes), site);
                  }});
    }
}

inline void copy_box(void* to, const CUtensorMap& map, int row, int column, uint64_t* barrier, EMULATION_SITE) {
    const auto own = static_cast<uint16_t>(1u << cluster_rank());
    copy_box_to(own, to, map, row, column, barrier, file, line);
}

// ---- products --------------------------------------------------------------------------------------------------

template <int kRegisters>
void keep_registers() {}
template <int kRegisters>
void take_registers() {}

// Components of an operand's rows as floats: component after component, so that columns of a product are neighbours.
template <typename T, int kRows>
void read_operand(float (&values)[kGroupComponents][kRows], uint64_t operand, Site site) {
    constexpr uint64_t kSwizzled = 1ull << 62, kPart = 0x3fff, kAligned = 7ull << 49;
    const auto begin = static_cast<unsigned>(operand & kPart) * 16;
    const auto group = static_cast<unsigned>(operand >> 32 & kPart) * 16;
    if ((operand & (3ull << 62 | kAligned)) != kSwizzled) machine().fail("an operand that is not swizzled", site);
    Block& block = *machine().current().block;
    for (int row = 0; row < kRows; ++row) {
        for (int piece = 0; piece < 2; ++piece) {
            const auto in_group = static_cast<unsigned>(row % 8 * 128 + piece * 16);
            const unsigned address = swizzled(begin + static_cast<unsigned>(row / 8) * group + in_group);
            unsigned words[4];
            std::memcpy(words, shared_bytes(block, address, sizeof words, site), sizeof words);
            for (int i = 0; i < 4; ++i) {
                float pair[2];
                unpack_word(words[i], static_cast<const T*>(nullptr), pair);
                values[piece * 8 + 2 * i][row] = pair[0];
                values[piece * 8 + 2 * i + 1][row] = pair[1];
            }
        }
    }
}

// Nearly all the time of a launch: compiled as well as a compiler can.
template <int kColumns>
__attribute__((optimize("O3"), no_sanitize_undefined, noinline)) void add_products_of(
    float* __restrict sums, const float (*__restrict left)[kGroupRows], const float (*__restrict right)[kColumns]) {
    for (int row = 0; row < kGroupRows; ++row) {
        for (int i = 0; i < kGroupComponents; ++i) {
            for (int c = 0; c < kColumns; ++c) sums[row * kColumns + c] += left[i][row] * right[i][c];
        }
    }
}

template <typename T, int kColumns>
void multiply_matrices(const Product& product) {
    // A fiber's stack is small.
    static float left[kGroupComponents][kGroupRows], right[kGroupComponents][kColumns];
    if (product.rows.empty()) read_operand<T>(left, product.left, product.site);
    else std::memcpy(left, product.rows.data(), sizeof left);
    read_operand<T>(right, product.right, product.site);
    std::vector<float>& sums = product.sums->values;
    if (!product.add) std::fill(sums.begin(), sums.end(), 0.0f);
    add_products_of(sums.data(), left, right);
}

inline Warpgroup& warpgroup_of(const Fiber& fiber, int& thread) {
    const auto linear = static_cast<int>(&fiber - fiber.block->fibers.data());
    thread = linear % kWarpgroup;
    return fiber.block->warpgroups[static_cast<size_t>(linear / kWarpgroup)];
}

inline void finish_products(Warpgroup& warpgroup, size_t count) {
    for (size_t& next = warpgroup.finished; next < count; ++next) {
        warpgroup.products[next].multiply(warpgroup.products[next]);
    }
}

inline void sync_warp(Site site) { machine().warp_exchange(Exchange::kSync, 0xffffffffu, 0, 0, site); }

inline void publish_writes() { machine().current().unpublished_copies = false; }

inline void begin_products() { machine().current().products.fenced = true; }
inline void end_products() {
    ThreadProducts& own = machine().current().products;
    own.groups.push_back(own.begun);
}

// lend(rows, thread): what the thread has of the left operand, if that comes from registers.
template <typename T, int kColumns, typename Lend>
void begin_product(float* sums, uint64_t left, uint64_t right, bool add, const Lend& lend, Site site) {
    Machine& gpu = machine();
    sync_warp(site);
    Fiber& self = gpu.current();
    int thread;
    Warpgroup& warpgroup = warpgroup_of(self, thread);
    if (!self.products.fenced) gpu.fail("products that are not begun anew after a wait", site);
    if (self.products.begun == warpgroup.products.size()) {
        Product product;
        product.left = left;
        product.right = right;
        product.add = add;
        product.multiply = &multiply_matrices<T, kColumns>;
        product.site = site;
        for (GroupSums& other : warpgroup.sums) {
            if (other.registers[thread] == sums) product.sums = &other;
        }
        if (product.sums == nullptr) product.sums = &warpgroup.sums.emplace_back(kColumns);
        warpgroup.products.push_back(product);
    }
    Product& product = warpgroup.products[self.products.begun++];
    if (product.left != left || product.right != right || product.add != add || !(product.site == site)) {
        gpu.fail("the threads of a warpgroup multiply different matrices", site);
    }
    float*& registers = product.sums->registers[thread];
    if (registers == nullptr) product.sums->take(thread, sums, add);
    if (registers != sums) gpu.fail("the threads of a warpgroup add to different sums", site);
    if (!product.sums->untouched(thread)) gpu.fail("sums were written while products were on their way", site);
    product.sums->products[thread] = self.products.begun;
    lend(product.rows, thread);
    if (++product.threads < kWarpgroup) return;
    for (const Fiber& fiber : self.block->fibers) {
        if (fiber.unpublished_copies) gpu.fail("products of copies that were not published", site);
    }
    if (gpu.launch().order == Order::kInterleaved || gpu.by_chance()) finish_products(warpgroup, self.products.begun);
    Fiber* first = &self - thread;
    for (int i = 0; i < kWarpgroup; ++i) {
        if (first[i].state == State::kInWarpgroup) gpu.wake(first[i]);
    }
}

template <typename T>
void multiply_group(float (&sums)[128], uint64_t left, uint64_t right, bool add, const T*, EMULATION_SITE) {
    begin_product<T, 256>(sums, left, right, add, [](std::vector<float>&, int) {}, {file, line});
}

// Of the words in registers, a thread has of rows g and g + 8 of its warp's 16 components 2 t and 2 t + 1, and then of
// both rows those eight further.
template <typename T>
void multiply_group(float (&sums)[8][4], const unsigned (&left)[4], uint64_t right, bool add, const T* type,
                    EMULATION_SITE) {
    const auto lend = [&](std::vector<float>& rows, int thread) {
        rows.resize(static_cast<size_t>(kGroupComponents) * kGroupRows);
        for (int word = 0; word < 4; ++word) {
            float pair[2];
            unpack_word(left[word], type, pair);
            const int row = thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8;
            const int component = word / 2 * 8 + thread % 4 * 2;
            for (int i = 0; i < 2; ++i) rows[static_cast<size_t>((component + i) * kGroupRows + row)] = pair[i];
        }
    };
    begin_product<T, 64>(&sums[0][0], 0, right, add, lend, {file, line});
}

inline void take_sums(float (&)[8][4]) {}

template <int kPending>
void wait_for_products(EMULATION_SITE) {
    const Site site{file, line};
    sync_warp(site);
    ThreadProducts& own = machine().current().products;
    own.fenced = false;
    if (own.groups.size() <= kPending) return;
    const size_t needed = own.groups[own.groups.size() - 1 - kPending];
    int thread;
    Warpgroup& warpgroup = warpgroup_of(machine().current(), thread);
    // They begin in order, so the last one says it of all.
    while (needed > 0 && warpgroup.products[needed - 1].threads < kWarpgroup) machine().wait(State::kInWarpgroup, site);
    finish_products(warpgroup, needed);
    for (auto sums = warpgroup.sums.begin(); sums != warpgroup.sums.end();) {
        if (sums->registers[thread] != nullptr && sums->products[thread] <= needed) {
            if (!sums->untouched(thread)) machine().fail("sums were written while products were on their way", site);
            sums->give_back(thread);
        }
        sums = sums->threads == 0 ? warpgroup.sums.erase(sums) : std::next(sums);
    }
}

}  // namespace emulation
