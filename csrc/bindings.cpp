// Registers the private ops lift_kernels_native::* under torch's stable ABI. This file checks
// shapes and dispatches on dtypes; it computes nothing. The public ops, with their schemas, fake
// implementations and argument checks, are in lift_kernels/ops.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef LIFT_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/levels.h"
#include "launchers.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

lift::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return lift::DType::f32;
    case ScalarType::BFloat16: return lift::DType::bf16;
    case ScalarType::Half: return lift::DType::f16;
    case ScalarType::Int: return lift::DType::i32;
    case ScalarType::Char: return lift::DType::code8;
    default: STD_TORCH_CHECK(false, "lift_kernels_native: unsupported dtype");
  }
}

void parallel_for(int64_t n, lift::ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

template <class T>
T* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

std::vector<lift::Segment> segments_of(const std::vector<Tensor>& grads, const std::vector<int64_t>& offsets,
                                       const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(grads.size() == offsets.size() && grads.size() == counts.size(),
                  "lift_kernels_native: list lengths differ");
  std::vector<lift::Segment> segments(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    segments[i].grad = grads[i].data_ptr();
    segments[i].offset = offsets[i];
    segments[i].count = counts[i];
  }
  return segments;
}

bool is_vector(const Tensor& tensor, ScalarType dtype, int64_t size) {
  return tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous();
}

// Whether segments lie within an arena of `size` entries.
bool segments_fit(const std::vector<int64_t>& offsets, const std::vector<int64_t>& counts, int64_t size) {
  for (size_t i = 0; i < offsets.size(); ++i)
    if (offsets[i] < 0 || counts[i] < 0 || offsets[i] > size || counts[i] > size - offsets[i]) return false;
  return true;
}

bool is_optional_vector(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t size) {
  return !tensor.has_value() || is_vector(*tensor, dtype, size);
}

bool is_split(const std::optional<Tensor>& master) {
  return master.has_value() && master->scalar_type() == ScalarType::Short;
}

// The optimizer state that the segments of all matrices share.
struct State {
  const Tensor &indices, &exp_avg, &exp_avg_sq;
  const std::optional<Tensor>&master, &births, &exp_avg_scale, &exp_avg_sq_scale;

  // Whether these are arenas of one length, of supported dtypes that go together and with `weight`,
  // and the segments groups of their own. Index lists that are not `listed` give the length alone.
  bool fits(ScalarType weight, const std::vector<int64_t>& offsets, bool listed = true) const {
    if (indices.dim() != 1 || indices.scalar_type() != ScalarType::Int || (listed && !indices.is_contiguous()))
      return false;
    const int64_t size = indices.size(0);
    const ScalarType moment = exp_avg.scalar_type();
    const bool coded = moment == ScalarType::Char;
    if (coded != exp_avg_scale.has_value() || coded != exp_avg_sq_scale.has_value()) return false;
    if (!coded && moment != ScalarType::Float && moment != ScalarType::BFloat16) return false;
    for (const int64_t offset : offsets)
      if (coded && offset % lift::kGroup != 0) return false;
    const int64_t groups = (size + lift::kGroup - 1) / lift::kGroup;
    return is_vector(exp_avg, moment, size) &&
           is_vector(exp_avg_sq, coded ? ScalarType::Byte : moment, size) &&
           is_optional_vector(exp_avg_scale, ScalarType::Float, groups) &&
           is_optional_vector(exp_avg_sq_scale, ScalarType::Float, groups) &&
           is_optional_vector(births, ScalarType::Int, size) &&
           (is_split(master) ? weight == ScalarType::BFloat16 && is_vector(*master, ScalarType::Short, size)
                             : is_optional_vector(master, ScalarType::Float, size));
  }
};

bool is_optional_scalar(const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || (tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1);
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

// torch's number of a dtype. `scalar_type()` looks it up in a table, which takes ten times as long:
// too long for hundreds of tensors in every step.
int32_t dtype_number(const Tensor& tensor) {
  int32_t number = -1;
  STD_TORCH_CHECK(aoti_torch_get_dtype(tensor.get(), &number) == 0, "lift_kernels_native: a tensor has no dtype");
  return number;
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Whether every tensor of a step has the dtype, shape and layout that the kernel assumes. On false
// the Python layer validates again and raises the detailed error.
bool fast_check(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Tensor& indices,
                const std::vector<int64_t>& offsets, const std::vector<int64_t>& counts, const State& state,
                const Tensor& steps, const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& found_inf,
                bool packed_grads, bool packed_weights, bool stochastic) {
  const size_t n = weights.size();
  if (n == 0 || grads.size() != n || offsets.size() != n || counts.size() != n || indices.dim() != 1) return false;
  if (packed_weights && !packed_grads) return false;
  const int64_t size = indices.size(0);
  const ScalarType weight = weights[0].scalar_type(), grad = grads[0].scalar_type();
  if (!is_float(weight) || !is_float(grad)) return false;
  if (stochastic && (state.master.has_value() || weight == ScalarType::Float)) return false;
  if (!state.fits(weight, offsets, !packed_weights) || !is_vector(steps, ScalarType::Float, int64_t(n)) ||
      !is_optional_scalar(inv_scale) || !is_optional_scalar(found_inf) || !segments_fit(offsets, counts, size))
    return false;
  const int32_t weight_number = dtype_number(weights[0]), grad_number = dtype_number(grads[0]);
  for (size_t i = 0; i < n; ++i) {
    const Tensor &w = weights[i], &g = grads[i];
    if (dtype_number(w) != weight_number || dtype_number(g) != grad_number) return false;
    if (!w.is_contiguous() || !g.is_contiguous()) return false;
    if (packed_grads ? g.numel() != counts[i] : !same_shape(w, g)) return false;
    if (packed_weights && w.numel() != counts[i]) return false;
  }
  return true;
}

float scalar_or(const std::optional<Tensor>& tensor, float otherwise) {
  return tensor.has_value() ? *static_cast<const float*>(tensor->data_ptr()) : otherwise;
}

// Returns whether the arguments passed fast_check. If not, nothing was changed.
bool sparse_adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, Tensor indices, std::vector<int64_t> offsets,
                   std::vector<int64_t> counts, Tensor exp_avg, Tensor exp_avg_sq, Tensor steps, double lr,
                   double beta1, double beta2, double eps, double weight_decay, std::optional<Tensor> master,
                   std::optional<Tensor> births, std::optional<Tensor> bias, std::optional<Tensor> exp_avg_scale,
                   std::optional<Tensor> exp_avg_sq_scale, std::optional<Tensor> inv_scale,
                   std::optional<Tensor> found_inf, bool packed_grads, bool packed_weights, bool maximize,
                   bool stochastic, int64_t seed) {
  const State state{indices, exp_avg, exp_avg_sq, master, births, exp_avg_scale, exp_avg_sq_scale};
  if (!fast_check(weights, grads, indices, offsets, counts, state, steps, inv_scale, found_inf, packed_grads,
                  packed_weights, stochastic))
    return false;
  if (scalar_or(found_inf, 0.0f) != 0.0f) return true;
  std::vector<lift::Segment> segments = segments_of(grads, offsets, counts);
  const float* step = static_cast<const float*>(steps.data_ptr());
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].weight = weights[i].data_ptr();
    segments[i].step = step[i];
  }
  lift::AdamW adamw{};
  adamw.indices = static_cast<const int32_t*>(indices.data_ptr());
  adamw.exp_avg = exp_avg.data_ptr();
  adamw.exp_avg_sq = exp_avg_sq.data_ptr();
  adamw.exp_avg_scale = pointer_or_null<float>(exp_avg_scale);
  adamw.exp_avg_sq_scale = pointer_or_null<float>(exp_avg_sq_scale);
  if (is_split(master)) adamw.master_low = static_cast<int16_t*>(master->data_ptr());
  else adamw.master = pointer_or_null<float>(master);
  adamw.births = pointer_or_null<const int32_t>(births);
  adamw.bias_table = pointer_or_null<const float>(bias);
  adamw.bias_ages = bias.has_value() ? bias->numel() / 2 - 1 : 0;
  adamw.lr = lr;
  adamw.beta1 = beta1;
  adamw.beta2 = beta2;
  adamw.eps = eps;
  adamw.weight_decay = weight_decay;
  adamw.grad_factor = scalar_or(inv_scale, 1.0f) * (maximize ? -1.0f : 1.0f);
  adamw.packed_grads = packed_grads;
  adamw.packed_weights = packed_weights;
  adamw.stochastic = stochastic;
  adamw.seed = uint32_t(seed);
  lift::sparse_adamw_cpu(segments.data(), int64_t(segments.size()), adamw, dtype_of(weights[0]), dtype_of(grads[0]),
                         dtype_of(exp_avg), parallel_for);
  return true;
}

void packed_gather(Tensor source, Tensor indices, Tensor out) {
  lift::packed_gather_cpu(source.data_ptr(), dtype_of(source), static_cast<const int32_t*>(indices.data_ptr()),
                          indices.numel(), out.data_ptr(), dtype_of(out), parallel_for);
}

void packed_scatter_(Tensor dest, Tensor indices, Tensor values) {
  lift::packed_scatter_cpu(dest.data_ptr(), dtype_of(dest), static_cast<const int32_t*>(indices.data_ptr()),
                           indices.numel(), values.data_ptr(), dtype_of(values), parallel_for);
}

void packed_migrate(Tensor values, Tensor old_indices, Tensor new_indices, Tensor out) {
  lift::packed_migrate_cpu(values.data_ptr(), int(values.element_size()),
                           static_cast<const int32_t*>(old_indices.data_ptr()), old_indices.numel(),
                           static_cast<const int32_t*>(new_indices.data_ptr()), new_indices.numel(), out.data_ptr(),
                           parallel_for);
}

// Nothing if there is no gradient, or one that the kernel cannot take. As after `fast_check`, the
// Python layer then raises the detailed error, or copies gradients to row-major order.
std::optional<Tensor> packed_square_sums(std::vector<Tensor> grads, Tensor indices, std::vector<int64_t> offsets,
                                         std::vector<int64_t> counts, bool packed_grads) {
  if (grads.empty() || grads.size() != offsets.size() || grads.size() != counts.size() || indices.dim() != 1 ||
      !is_vector(indices, ScalarType::Int, indices.size(0)) || !segments_fit(offsets, counts, indices.size(0)) ||
      !is_float(grads[0].scalar_type()))
    return std::nullopt;
  const int32_t number = dtype_number(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (dtype_number(grads[i]) != number || !grads[i].is_contiguous()) return std::nullopt;
    if (packed_grads && grads[i].numel() != counts[i]) return std::nullopt;
  }
  const std::vector<lift::Segment> segments = segments_of(grads, offsets, counts);
  const int64_t n = int64_t(segments.size());
  const std::vector<int64_t> shape{lift::square_sum_blocks(segments.data(), n)};
  Tensor partials = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Double);
  lift::packed_square_sums_cpu(segments.data(), n, static_cast<const int32_t*>(indices.data_ptr()), dtype_of(grads[0]),
                               packed_grads, static_cast<double*>(partials.data_ptr()), parallel_for);
  return partials;
}

// Returns how many entries of each matrix stay. Returns nothing, and has changed nothing, if an
// argument is not as the kernel assumes.
std::optional<Tensor> arena_migrate_(std::vector<Tensor> weights, std::vector<Tensor> new_indices, Tensor indices,
                                     std::vector<int64_t> offsets, std::vector<int64_t> counts, Tensor exp_avg,
                                     Tensor exp_avg_sq, Tensor steps, std::optional<Tensor> master,
                                     std::optional<Tensor> births, std::optional<Tensor> exp_avg_scale,
                                     std::optional<Tensor> exp_avg_sq_scale) {
  const size_t n = weights.size();
  if (n == 0 || new_indices.size() != n || offsets.size() != n || counts.size() != n) return std::nullopt;
  const ScalarType weight = weights[0].scalar_type();
  const State state{indices, exp_avg, exp_avg_sq, master, births, exp_avg_scale, exp_avg_sq_scale};
  if (!is_float(weight) || !state.fits(weight, offsets) || !is_vector(steps, ScalarType::Float, int64_t(n)) ||
      !segments_fit(offsets, counts, indices.size(0)))
    return std::nullopt;
  const float* step = static_cast<const float*>(steps.data_ptr());
  std::vector<lift::Migration> matrices(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = new_indices[i].numel();
    if (weights[i].scalar_type() != weight || !weights[i].is_contiguous() ||
        !is_vector(new_indices[i], ScalarType::Int, count) || count > weights[i].numel() ||
        count > indices.size(0) - offsets[i])
      return std::nullopt;
    matrices[i] = {weights[i].data_ptr(), static_cast<const int32_t*>(new_indices[i].data_ptr()), offsets[i], counts[i],
                   count, int32_t(step[i])};
  }
  const lift::MigrationArenas arenas{static_cast<int32_t*>(indices.data_ptr()),
                                     exp_avg.data_ptr(),
                                     exp_avg_sq.data_ptr(),
                                     pointer_or_null<float>(exp_avg_scale),
                                     pointer_or_null<float>(exp_avg_sq_scale),
                                     is_split(master) ? nullptr : pointer_or_null<float>(master),
                                     is_split(master) ? static_cast<int16_t*>(master->data_ptr()) : nullptr,
                                     pointer_or_null<int32_t>(births)};
  const std::vector<int64_t> shape{int64_t(n)};
  Tensor kept = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Long);
  lift::arena_migrate_cpu(matrices.data(), int64_t(n), arenas, dtype_of(weights[0]), dtype_of(exp_avg),
                          static_cast<int64_t*>(kept.data_ptr()), parallel_for);
  return kept;
}

double lowrank_topk(Tensor left, Tensor right, double low, double high, Tensor indices) {
  return lift::lowrank_topk_cpu(static_cast<const float*>(left.data_ptr()), static_cast<const float*>(right.data_ptr()),
                                left.size(0), right.size(0), left.size(1), indices.numel(), float(low), float(high),
                                static_cast<int32_t*>(indices.data_ptr()), parallel_for);
}

// out = a @ b through torch's dispatcher, which picks the fastest product of this build.
void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION) == 0,
                  "lift_kernels_native: the product of a gradient panel failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // drops a second handle of `out`
}

// A panel in memory that each thread keeps, so that the layers of a backward pass do not wait for
// new pages.
Tensor panel_memory(const std::vector<int64_t>& shape, const Tensor& like) {
  thread_local std::vector<char> memory;
  const size_t needed = size_t(shape[0] * shape[1]) * size_t(like.element_size()) + 64;
  if (memory.size() < needed) std::vector<char>(needed).swap(memory);
  const std::vector<int64_t> strides{shape[1], 1};
  void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  return torch::stable::from_blob(aligned, {shape.data(), shape.size()}, {strides.data(), strides.size()},
                                  like.device(), like.scalar_type());
}

void packed_weight_grad(Tensor grad_output, Tensor input, Tensor indices, Tensor out) {
  const int64_t m = grad_output.size(1), n = input.size(1), width = int64_t(grad_output.element_size());
  const int64_t k = indices.numel(), height = lift::panel_rows(m, n, width), out_width = int64_t(out.element_size());
  const auto* index = static_cast<const int32_t*>(indices.data_ptr());
  Tensor rows = torch::stable::transpose(grad_output, 0, 1);
  const std::vector<int64_t> shape{height, n};
  Tensor scratch = panel_memory(shape, grad_output);
  for (int64_t row = 0; row < m; row += height) {
    const int64_t count = std::min(height, m - row);
    const lift::PanelEntries entries = lift::panel_entries(index, k, row, count, n);
    if (entries.count == 0) continue;
    const Tensor left = torch::stable::narrow(rows, 0, row, count);
    const Tensor panel = torch::stable::narrow(scratch, 0, 0, count);
    mm_out(left, input, panel);
    lift::packed_gather_cpu(panel.data_ptr(), dtype_of(panel), index + entries.first, entries.count,
                            static_cast<char*>(out.data_ptr()) + entries.first * out_width, dtype_of(out), parallel_for,
                            row * n, lift::kCachedChunk);
  }
}

// The levels of instruction sets that this machine has, the lowest first, and the one in use.
int64_t cpu_level_count() { return lift::level_count(); }
std::string cpu_level_name(int64_t level) { return lift::level_name(int(level)); }
int64_t cpu_level() { return lift::current_level(); }
void use_cpu_level(int64_t level) {
  STD_TORCH_CHECK(level >= 0 && level < lift::level_count(), "lift_kernels_native: this machine has no level ", level);
  lift::use_level(int(level));
}

#ifdef LIFT_WITH_CUDA
// torch's current stream on a tensor's device. While this lives, that device is torch's current one.
// A temporary in a call lives until the call has returned.
struct CurrentStream {
  torch::stable::accelerator::DeviceGuard guard;
  lift::DeviceStream stream;

  operator lift::DeviceStream() const { return stream; }
};

// The stream comes from a function that only a CUDA build of torch exports. The extension does not
// link to that library. Python loads torch's libraries into a local scope that RTLD_DEFAULT does
// not search, so the library is looked up by name. It is never loaded here (RTLD_NOLOAD).
CurrentStream current_stream(const Tensor& tensor) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* const loaded = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(
        dlsym(loaded != nullptr ? loaded : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "lift_kernels_native: this torch was built without CUDA");
  lift::DeviceStream stream{tensor.get_device(), nullptr};
  STD_TORCH_CHECK(get(stream.device, &stream.handle) == 0, "lift_kernels_native: torch gave no CUDA stream");
  return {torch::stable::accelerator::DeviceGuard(stream.device), stream};
}

void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "lift_kernels_native: CUDA error ", error); }

void packed_gather_on_cuda(Tensor source, Tensor indices, Tensor out) {
  check_cuda(lift::packed_gather_cuda(source.data_ptr(), dtype_of(source),
                                      static_cast<const int32_t*>(indices.data_ptr()), indices.numel(), out.data_ptr(),
                                      dtype_of(out), current_stream(indices)));
}

void packed_scatter_on_cuda(Tensor dest, Tensor indices, Tensor values) {
  check_cuda(lift::packed_scatter_cuda(dest.data_ptr(), dtype_of(dest), static_cast<const int32_t*>(indices.data_ptr()),
                                  indices.numel(), values.data_ptr(), dtype_of(values), current_stream(indices)));
}

void packed_migrate_on_cuda(Tensor values, Tensor old_indices, Tensor new_indices, Tensor out) {
  check_cuda(lift::packed_migrate_cuda(values.data_ptr(), int(values.element_size()),
                                       static_cast<const int32_t*>(old_indices.data_ptr()), old_indices.numel(),
                                       static_cast<const int32_t*>(new_indices.data_ptr()), new_indices.numel(),
                                       out.data_ptr(), current_stream(values)));
}

float* float_pointer(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void gaussian_sketch_on_cuda(Tensor block, int64_t seed, int64_t first) {
  check_cuda(lift::gaussian_sketch_cuda(block.data_ptr(), dtype_of(block), block.size(0), block.size(1) * block.size(2),
                                        uint64_t(seed), uint64_t(first), current_stream(block)));
}

void gram_on_cuda(Tensor product, std::optional<Tensor> block, std::optional<Tensor> previous,
                  std::optional<Tensor> edge, std::optional<Tensor> raised, int64_t slab_rows, Tensor partials) {
  STD_TORCH_CHECK(partials.size(1) == (product.size(1) + slab_rows - 1) / slab_rows,
                  "lift_kernels_native: slabs do not fit");
  check_cuda(lift::gram_cuda(float_pointer(product), pointer_or_null<const float>(block),
                             pointer_or_null<const float>(previous), pointer_or_null<const float>(edge),
                             pointer_or_null<float>(raised), product.size(0), product.size(1), product.size(2),
                             slab_rows, float_pointer(partials), current_stream(product)));
}

void cholesky_inverse_on_cuda(Tensor partials, Tensor gram, Tensor scale, Tensor inverse, Tensor status) {
  check_cuda(lift::cholesky_inverse_cuda(float_pointer(partials), partials.size(0), partials.size(1), gram.size(1),
                                         float_pointer(gram), float_pointer(scale), float_pointer(inverse),
                                         static_cast<int32_t*>(status.data_ptr()), current_stream(partials)));
}

void multiply_upper_on_cuda(Tensor x, Tensor inverse, Tensor status) {
  check_cuda(lift::multiply_upper_cuda(float_pointer(x), float_pointer(inverse),
                                       static_cast<const int32_t*>(status.data_ptr()), x.size(0), x.size(1), x.size(2),
                                       current_stream(x)));
}

void bitmap_to_indices_on_cuda(Tensor bitmaps, Tensor candidates, Tensor counts, int64_t columns, Tensor totals,
                               Tensor indices, Tensor thresholds, Tensor status) {
  const int64_t matrices = bitmaps.size(0), rows = bitmaps.size(1);
  STD_TORCH_CHECK(totals.numel() == matrices * lift::bitmap_tiles(rows, columns),
                  "lift_kernels_native: tiles do not fit");
  const auto int32s = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
  check_cuda(lift::bitmap_to_indices_cuda(int32s(bitmaps), matrices, rows, columns,
                                          static_cast<const int64_t*>(candidates.data_ptr()), candidates.size(1),
                                          int32s(counts), indices.size(1), int32s(totals), int32s(indices),
                                          float_pointer(thresholds), int32s(status), current_stream(bitmaps)));
}

int64_t cuda_runtime_version() { return lift::cuda_runtime_version(); }
int64_t cuda_driver_version() { return lift::cuda_driver_version(); }
bool cuda_has_code() { return lift::cuda_has_code(); }
#else
int64_t cuda_runtime_version() { return 0; }
int64_t cuda_driver_version() { return 0; }
bool cuda_has_code() { return false; }
#endif

}  // namespace

STABLE_TORCH_LIBRARY(lift_kernels_native, m) {
  m.def(
      "sparse_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor indices, int[] offsets, int[] counts, "
      "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, Tensor(d!)? master, Tensor? births, Tensor? bias, Tensor(e!)? exp_avg_scale, "
      "Tensor(f!)? exp_avg_sq_scale, Tensor? inv_scale, Tensor? found_inf, bool packed_grads, bool packed_weights, "
      "bool maximize, bool stochastic, int seed) -> bool");
  m.def("packed_gather(Tensor source, Tensor indices, Tensor(a!) out) -> ()");
  m.def("packed_scatter_(Tensor(a!) dest, Tensor indices, Tensor values) -> ()");
  m.def("packed_migrate(Tensor values, Tensor old_indices, Tensor new_indices, Tensor(a!) out) -> ()");
  m.def(
      "arena_migrate_(Tensor[] weights, Tensor[] new_indices, Tensor(a!) indices, int[] offsets, int[] counts, "
      "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, Tensor(d!)? master, Tensor(e!)? births, "
      "Tensor(f!)? exp_avg_scale, Tensor(g!)? exp_avg_sq_scale) -> Tensor?");
  m.def(
      "packed_square_sums(Tensor[] grads, Tensor indices, int[] offsets, int[] counts, bool packed_grads) "
      "-> Tensor?");
  m.def("lowrank_topk(Tensor left, Tensor right, float low, float high, Tensor(a!) indices) -> float");
  m.def("packed_weight_grad(Tensor grad_output, Tensor input, Tensor indices, Tensor(a!) out) -> ()");
  m.def("gaussian_sketch_(Tensor(a!) block, int seed, int first) -> ()");
  m.def(
      "gram(Tensor product, Tensor? block, Tensor? previous, Tensor? edge, Tensor(a!)? raised, int slab_rows, "
      "Tensor(b!) partials) -> ()");
  m.def(
      "cholesky_inverse(Tensor partials, Tensor(a!) gram, Tensor(b!) scale, Tensor(c!) inverse, Tensor(d!) status) "
      "-> ()");
  m.def("multiply_upper_(Tensor(a!) x, Tensor inverse, Tensor status) -> ()");
  m.def(
      "bitmap_to_indices(Tensor(a!) bitmaps, Tensor candidates, Tensor counts, int columns, Tensor(b!) totals, "
      "Tensor(c!) indices, Tensor(d!) thresholds, Tensor(e!) status) -> ()");
  m.def("cpu_level_count() -> int");
  m.def("cpu_level_name(int level) -> str");
  m.def("cpu_level() -> int");
  m.def("use_cpu_level(int level) -> ()");
  m.def("cuda_runtime_version() -> int");
  m.def("cuda_driver_version() -> int");
  m.def("cuda_has_code() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lift_kernels_native, CPU, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_));
  m.impl("packed_gather", TORCH_BOX(&packed_gather));
  m.impl("packed_scatter_", TORCH_BOX(&packed_scatter_));
  m.impl("packed_migrate", TORCH_BOX(&packed_migrate));
  m.impl("arena_migrate_", TORCH_BOX(&arena_migrate_));
  m.impl("packed_square_sums", TORCH_BOX(&packed_square_sums));
  m.impl("lowrank_topk", TORCH_BOX(&lowrank_topk));
  m.impl("packed_weight_grad", TORCH_BOX(&packed_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(lift_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level_count", TORCH_BOX(&cpu_level_count));
  m.impl("cpu_level_name", TORCH_BOX(&cpu_level_name));
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("use_cpu_level", TORCH_BOX(&use_cpu_level));
  m.impl("cuda_runtime_version", TORCH_BOX(&cuda_runtime_version));
  m.impl("cuda_driver_version", TORCH_BOX(&cuda_driver_version));
  m.impl("cuda_has_code", TORCH_BOX(&cuda_has_code));
}

#ifdef LIFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lift_kernels_native, CUDA, m) {
  m.impl("packed_gather", TORCH_BOX(&packed_gather_on_cuda));
  m.impl("packed_scatter_", TORCH_BOX(&packed_scatter_on_cuda));
  m.impl("packed_migrate", TORCH_BOX(&packed_migrate_on_cuda));
  m.impl("gaussian_sketch_", TORCH_BOX(&gaussian_sketch_on_cuda));
  m.impl("gram", TORCH_BOX(&gram_on_cuda));
  m.impl("cholesky_inverse", TORCH_BOX(&cholesky_inverse_on_cuda));
  m.impl("multiply_upper_", TORCH_BOX(&multiply_upper_on_cuda));
  m.impl("bitmap_to_indices", TORCH_BOX(&bitmap_to_indices_on_cuda));
}
#endif
