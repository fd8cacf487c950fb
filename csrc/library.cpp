// The module vgpo_kernels._C: what was built, which settings are read, and the memory ceilings that benchmarks compare
// with. The operators register beside their functions; Python defines their schemas.
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/bf16_product.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "settings.h"
#include "shaping_math.h"
#ifdef VGPO_HAS_CUDA
#include "cuda/head_tiles.h"
#endif

// Defined in a source that setup.py writes: what follows the colon is a digest of all sources, which vgpo_kernels
// compares with those beside it before it loads the extension.
namespace vgpo {
extern const char source_digest[];
}

namespace {

constexpr bool kHasCuda =
#ifdef VGPO_HAS_CUDA
    true;
#else
    false;
#endif

constexpr bool kHasHopper =
#ifdef VGPO_HOPPER
    true;
#else
    false;
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// One item of work of the ceilings.
constexpr int64_t kPieceBytes = 1024 * 1024;

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const vgpo::Kernels* const* table = vgpo::available_kernels(); *table != nullptr; ++table) {
        names.emplace_back((*table)->name);
    }
    return names;
}

void set_simd(const std::string& name) {
    TORCH_CHECK_VALUE(vgpo::choose_kernels(name.c_str()), "simd must be one of ",
                      c10::ArrayRef<std::string>(simd_levels()), ", got '", name, "'");
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = kCompiler;
    info["cuda"] = kHasCuda;
    info["hopper"] = kHasHopper;
    info["simd"] = vgpo::kernels().name;
    info["simd_levels"] = simd_levels();
    info["source_digest"] = std::strchr(vgpo::source_digest, ':') + 1;
    info["bf16_products"] = vgpo::has_bf16_products();
    info["threads"] = at::get_num_threads();
    return info;
}

// The name and kind of every field, and the number of choices of those that are codes.
template <typename Settings>
std::vector<std::tuple<std::string, std::string, int>> fields_read() {
    std::vector<vgpo::SettingsReader::Field> fields;
    vgpo::SettingsReader reader(nullptr, 0, &fields);
    Settings().read(reader);
    std::vector<std::tuple<std::string, std::string, int>> found;
    for (const auto& field : fields) found.emplace_back(field.name, field.kind, field.choices);
    return found;
}

int64_t head_tile_columns([[maybe_unused]] const at::Tensor& hidden, [[maybe_unused]] const at::Tensor& weight,
                          [[maybe_unused]] bool has_bias) {
#ifdef VGPO_HAS_CUDA
    if (vgpo::cuda::suits_tiles(hidden, weight, has_bias)) return vgpo::cuda::tile_workspace_columns(weight.size(0));
#endif
    return 0;
}

int64_t contiguous_bytes(const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), "tensor must be contiguous and on the CPU");
    return tensor.numel() * tensor.element_size();
}

template <typename Work>
void for_pieces(int64_t bytes, const Work& work) {
    vgpo::parallel_items((bytes + kPieceBytes - 1) / kPieceBytes, [&](int64_t piece) {
        const int64_t begin = piece * kPieceBytes;
        work(piece, begin, std::min(kPieceBytes, bytes - begin));
    });
}

// Returns the largest of the tensor's bytes read as floats: a value that needs every one of them.
float read_memory(const at::Tensor& tensor) {
    const int64_t bytes = contiguous_bytes(tensor);
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    std::vector<float> results((bytes + kPieceBytes - 1) / kPieceBytes);
    for_pieces(bytes, [&](int64_t piece, int64_t begin, int64_t length) {
        const auto* values = reinterpret_cast<const float*>(data + begin);
        results[piece] = vgpo::kernels().read(values, length / static_cast<int64_t>(sizeof(float)));
    });
    float largest = 0.0f;
    for (float result : results) largest = std::max(largest, result);
    return largest;
}

void copy_memory(const at::Tensor& from, const at::Tensor& to) {
    const int64_t bytes = contiguous_bytes(from);
    TORCH_CHECK_VALUE(contiguous_bytes(to) == bytes, "both tensors must have the same number of bytes");
    const char* source = static_cast<const char*>(from.const_data_ptr());
    char* target = static_cast<char*>(to.mutable_data_ptr());
    for_pieces(bytes, [&](int64_t, int64_t begin, int64_t length) {
        std::memcpy(target + begin, source + begin, static_cast<size_t>(length));
    });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Build information of vgpo_kernels, the settings it reads, and memory ceilings for its benchmarks.";
    module.def("has_cuda", [] { return kHasCuda; }, "Whether CUDA kernels were compiled.");
    module.def("build_info", &build_info, "What was built, and the SIMD level in use.");
    module.def("config_fields", &fields_read<vgpo::WeightsConfig>, "Fields of VGPOConfig as kernels read them.");
    module.def("shaping_fields", &fields_read<vgpo::ShapingConfig>, "Fields of ShapingConfig as kernels read them.");
    module.def("options_fields", &fields_read<vgpo::LossOptions>, "Fields of PolicyLossOptions as kernels read them.");
    module.def("head_tile_columns", &head_tile_columns,
               "Columns of the workspace with which head_statistics computes these matrices in tiles; 0: it cannot.");
    module.def("simd_levels", &simd_levels, "SIMD levels that this processor runs, the simplest first.");
    module.def("simd", [] { return std::string(vgpo::kernels().name); }, "The SIMD level in use.");
    module.def("threads_used", [] { return vgpo::threads_used.load(); }, "Whether work has run on several threads.");
    module.def("set_simd", &set_simd, pybind11::arg("name"), "Use a SIMD level, in the whole process.");
    module.def("read_memory", &read_memory, pybind11::arg("tensor"),
               pybind11::call_guard<pybind11::gil_scoped_release>(), "Read a contiguous CPU tensor with all threads.");
    module.def("copy_memory", &copy_memory, pybind11::arg("source"), pybind11::arg("target"),
               pybind11::call_guard<pybind11::gil_scoped_release>(), "Copy a contiguous CPU tensor with all threads.");
}
