// Runs the CPU kernels on problems from a file, without torch, so also on emulated machines.
//
//   driver                        prints the levels of this CPU, one a line
//   driver LEVEL PROBLEMS RESULTS   runs them at a level; an empty one is the highest, if there is one
//
// The file holds problems one after another: an int64 with the length of the name of the op, the
// name, an int64 with the number of arrays, and for each array an int64 with its bytes and then
// these. The results are the same arrays after the call, in the same form. helpers/drivers.py
// writes and reads the files and says what the arrays are.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/levels.h"
#include "../../csrc/launchers.h"

namespace {

// Three ranges, each in a thread of its own.
void parallel_for(int64_t n, lift::ParallelBody body, void* context) {
  std::vector<std::thread> threads;
  const int64_t range = (n + 2) / 3;
  for (int64_t begin = 0; begin < n; begin += range)
    threads.emplace_back(body, begin, begin + range < n ? begin + range : n, context);
  for (std::thread& thread : threads) thread.join();
}

struct Array {
  std::unique_ptr<char[]> bytes;
  int64_t size = 0;

  // Null if the array is empty: that is how an absent arena is written.
  template <class T>
  T* as() const {
    return size == 0 ? nullptr : reinterpret_cast<T*>(bytes.get());
  }
};

using Arrays = std::vector<Array>;

lift::DType dtype(int64_t number) { return static_cast<lift::DType>(number); }

std::vector<lift::Segment> segments_of(int64_t n, const Array& offsets, const Array& counts) {
  std::vector<lift::Segment> segments(static_cast<size_t>(n), lift::Segment{});
  for (int64_t i = 0; i < n; ++i) {
    segments[size_t(i)].offset = offsets.as<int64_t>()[i];
    segments[size_t(i)].count = counts.as<int64_t>()[i];
  }
  return segments;
}

// Settings: n, dtypes of weight, gradient and moment, packed gradients, stochastic, seed, whether the
// masters are low halves, packed weights. Then lr, beta1, beta2, eps, weight decay, factor of the
// gradient.
void sparse_adamw(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  const double* scalars = a[1].as<double>();
  std::vector<lift::Segment> segments = segments_of(s[0], a[2], a[3]);
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].step = a[4].as<float>()[i];
    segments[i].weight = a[13 + i].as<void>();
    segments[i].grad = a[13 + segments.size() + i].as<void>();
  }
  lift::AdamW adamw{};
  adamw.indices = a[5].as<int32_t>();
  adamw.exp_avg = a[6].as<void>();
  adamw.exp_avg_sq = a[7].as<void>();
  if (s[7] != 0) adamw.master_low = a[8].as<int16_t>();
  else adamw.master = a[8].as<float>();
  adamw.births = a[9].as<int32_t>();
  adamw.bias_table = a[10].as<float>();
  adamw.bias_ages = a[10].size / int64_t(2 * sizeof(float)) - 1;
  adamw.exp_avg_scale = a[11].as<float>();
  adamw.exp_avg_sq_scale = a[12].as<float>();
  adamw.lr = scalars[0];
  adamw.beta1 = scalars[1];
  adamw.beta2 = scalars[2];
  adamw.eps = scalars[3];
  adamw.weight_decay = scalars[4];
  adamw.grad_factor = float(scalars[5]);
  adamw.packed_grads = s[4] != 0;
  adamw.stochastic = s[5] != 0;
  adamw.seed = uint32_t(s[6]);
  adamw.packed_weights = s[8] != 0;
  lift::sparse_adamw_cpu(segments.data(), s[0], adamw, dtype(s[1]), dtype(s[2]), dtype(s[3]), parallel_for);
}

void packed_gather(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  lift::packed_gather_cpu(a[1].as<void>(), dtype(s[0]), a[2].as<int32_t>(), s[2], a[3].as<void>(), dtype(s[1]),
                          parallel_for);
}

void packed_scatter(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  lift::packed_scatter_cpu(a[1].as<void>(), dtype(s[0]), a[2].as<int32_t>(), s[2], a[3].as<void>(), dtype(s[1]),
                           parallel_for);
}

void packed_migrate(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  lift::packed_migrate_cpu(a[1].as<void>(), int(s[0]), a[2].as<int32_t>(), s[1], a[3].as<int32_t>(), s[2],
                           a[4].as<void>(), parallel_for);
}

void packed_square_sums(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  std::vector<lift::Segment> segments = segments_of(s[0], a[1], a[2]);
  for (size_t i = 0; i < segments.size(); ++i) segments[i].grad = a[5 + i].as<void>();
  lift::packed_square_sums_cpu(segments.data(), s[0], a[3].as<int32_t>(), dtype(s[1]), s[2] != 0, a[4].as<double>(),
                               parallel_for);
}

// Settings: n, dtypes of weight and moment, whether the masters are low halves. Offsets, old counts,
// steps; indices, moments, masters, births, scales; kept; then weights and new lists.
void arena_migrate(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  const size_t n = size_t(s[0]);
  std::vector<lift::Migration> matrices(n);
  for (size_t i = 0; i < n; ++i) {
    const Array& list = a[12 + n + i];
    matrices[i].weight = a[12 + i].as<void>();
    matrices[i].new_indices = list.as<int32_t>();
    matrices[i].offset = a[1].as<int64_t>()[i];
    matrices[i].old_count = a[2].as<int64_t>()[i];
    matrices[i].new_count = list.size / int64_t(sizeof(int32_t));
    matrices[i].step = int32_t(a[3].as<float>()[i]);
  }
  lift::MigrationArenas arenas{};
  arenas.indices = a[4].as<int32_t>();
  arenas.exp_avg = a[5].as<void>();
  arenas.exp_avg_sq = a[6].as<void>();
  if (s[3] != 0) arenas.master_low = a[7].as<int16_t>();
  else arenas.master = a[7].as<float>();
  arenas.births = a[8].as<int32_t>();
  arenas.exp_avg_scale = a[9].as<float>();
  arenas.exp_avg_sq_scale = a[10].as<float>();
  lift::arena_migrate_cpu(matrices.data(), s[0], arenas, dtype(s[1]), dtype(s[2]), a[11].as<int64_t>(), parallel_for);
}

void lowrank_topk(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  const float* bracket = a[1].as<float>();
  *a[5].as<float>() = lift::lowrank_topk_cpu(a[2].as<float>(), a[3].as<float>(), s[0], s[1], s[2], s[3], bracket[0],
                                             bracket[1], a[4].as<int32_t>(), parallel_for);
}

// Rows of a panel, then the first entry and the number of entries of every panel.
void panels(const Arrays& a) {
  const int64_t* s = a[0].as<int64_t>();
  const int64_t m = s[0], n = s[1], rows = lift::panel_rows(m, n, s[2]);
  int64_t* out = a[2].as<int64_t>();
  *out++ = rows;
  for (int64_t row = 0; row < m; row += rows) {
    const lift::PanelEntries entries =
        lift::panel_entries(a[1].as<int32_t>(), a[1].size / int64_t(sizeof(int32_t)), row, rows, n);
    *out++ = entries.first;
    *out++ = entries.count;
  }
}

const struct {
  const char* name;
  void (*run)(const Arrays&);
} kOps[] = {
    {"sparse_adamw", sparse_adamw},
    {"packed_gather", packed_gather},
    {"packed_scatter", packed_scatter},
    {"packed_migrate", packed_migrate},
    {"packed_square_sums", packed_square_sums},
    {"arena_migrate", arena_migrate},
    {"lowrank_topk", lowrank_topk},
    {"panels", panels},
};

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "driver: %s\n", message.c_str());
  std::exit(2);
}

int64_t read_number(std::istream& in) {
  int64_t number = 0;
  if (!in.read(reinterpret_cast<char*>(&number), sizeof number)) fail("the problems end in the middle of one");
  return number;
}

void write_number(std::ostream& out, int64_t number) { out.write(reinterpret_cast<char*>(&number), sizeof number); }

void choose_level(const std::string& name) {
  if (name.empty()) return;  // the highest, or none
  for (int level = 0; level < lift::level_count(); ++level)
    if (name == lift::level_name(level)) return lift::use_level(level);
  fail("this CPU has no level " + name);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (int level = 0; level < lift::level_count(); ++level) std::puts(lift::level_name(level));
    return 0;
  }
  if (count != 4) fail("takes a level, a file of problems and one for the results");
  choose_level(arguments[1]);
  std::ifstream in(arguments[2], std::ios::binary);
  std::ofstream out(arguments[3], std::ios::binary);
  while (in.peek() != std::char_traits<char>::eof()) {
    std::string name(size_t(read_number(in)), '\0');
    in.read(name.data(), std::streamsize(name.size()));
    Arrays arrays(static_cast<size_t>(read_number(in)));
    for (Array& array : arrays) {
      array.size = read_number(in);
      array.bytes.reset(new char[size_t(array.size)]);
      if (!in.read(array.bytes.get(), array.size)) fail("the problems end in the middle of " + name);
    }
    bool found = false;
    for (const auto& op : kOps)
      if (name == op.name) {
        op.run(arrays);
        found = true;
      }
    if (!found) fail("there is no op " + name);
    for (const Array& array : arrays) {
      write_number(out, array.size);
      out.write(array.bytes.get(), array.size);
    }
  }
  return out.flush() ? 0 : 2;
}
