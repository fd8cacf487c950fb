// Where the static shared memory of an emulated block lies.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdint>

namespace emulation {

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

}  // namespace emulation
