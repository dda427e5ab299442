// The module mor._host: pybind11 only, no torch header, so quick to compile and free of torch's
// ABI. Types and documentation for Python stand in mor/_host.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <variant>

#include "scheduler.h"

namespace py = pybind11;

namespace mor::host {
namespace {

// What the compiler was, for `mor info` and bug reports.
const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

using Points = std::vector<std::pair<double, double>>;
template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: 1.5 is no token
using Bytes = std::optional<Array<uint8_t>>;

template <typename T>
T named(const char* option, const std::string& value,
        const std::vector<std::pair<const char*, T>>& choices) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    names += std::string(names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(std::string(option) + ": expected one of " + names + ", got " +
                              value);
}

std::unique_ptr<Scheduler> make_scheduler(
    int32_t num_blocks, int32_t block_size, int32_t ends_block_tokens, int32_t num_recursions,
    const std::string& router, const std::string& kv_strategy, int32_t max_rows, int32_t chunk,
    const std::variant<std::string, double>& policy, std::optional<int32_t> max_wait,
    Points block_seconds, Points ends_seconds, double aging_s, double watermark,
    double growth_ratio, bool prefix_cache, std::optional<int32_t> window, int hash_bits) {
  Options options;
  options.num_blocks = num_blocks;
  options.block_size = block_size;
  options.ends_block_tokens = ends_block_tokens;
  options.num_recursions = num_recursions;
  options.router = named<Router>(
      "router", router,
      {{"expert", Router::kExpert}, {"token", Router::kToken}, {"none", Router::kNone}});
  options.kv_strategy = named<KvStrategy>("kv_strategy", kv_strategy,
                                          {{"recursion", KvStrategy::kRecursion},
                                           {"shared", KvStrategy::kShared},
                                           {"hybrid", KvStrategy::kHybrid}});
  options.max_rows = max_rows;
  options.chunk = chunk;
  if (const auto* name = std::get_if<std::string>(&policy)) {
    options.automatic = named<bool>("policy", *name, {{"auto", true}, {"lock-step", false}});
  } else {
    options.automatic = false;
    options.theta = std::get<double>(policy);
  }
  if (max_wait.has_value() && *max_wait < 1) {
    throw std::invalid_argument("max_wait: expected at least 1, got " + std::to_string(*max_wait));
  }
  options.max_wait = max_wait.value_or(0);
  options.block_seconds = Curve("block_seconds", std::move(block_seconds));
  options.ends_seconds = Curve("ends_seconds", std::move(ends_seconds));
  options.aging_s = aging_s;
  options.watermark = watermark;
  options.growth_ratio = growth_ratio;
  options.prefix_cache = prefix_cache;
  if (window.has_value() && *window < 1) {
    throw std::invalid_argument("window: expected at least 1, got " + std::to_string(*window));
  }
  options.window = window.value_or(0);
  options.hash_bits = hash_bits;
  return std::make_unique<Scheduler>(std::move(options));
}

int64_t add(Scheduler& self, const py::object& sequence, int32_t max_tokens, double now,
            int32_t priority, std::optional<double> deadline, int32_t n,
            std::optional<int32_t> max_recursions, double threshold, uint64_t tenant,
            bool prefix_cache, bool prompt_logits) {
  Request request;
  const auto given = py::array::ensure(sequence);
  if (!given) {
    PyErr_Clear();
    throw std::invalid_argument("tokens: expected a sequence or array of integers");
  }
  const char kind = given.dtype().kind();
  if (given.ndim() != 1 || (given.size() > 0 && kind != 'i' && kind != 'u')) {
    throw std::invalid_argument("tokens: expected 1 dimension of integers, got " +
                                std::to_string(given.ndim()) + " of " +
                                std::string(py::str(given.dtype())));
  }
  const auto tokens = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(given);
  const int64_t* ids = tokens.data();
  for (py::ssize_t i = 0; i < tokens.size(); ++i) {
    if (ids[i] < 0 || ids[i] > INT32_MAX) {
      throw std::invalid_argument("tokens: expected 0 to 2^31 - 1, got " + std::to_string(ids[i]));
    }
  }
  request.tokens.assign(ids, ids + tokens.size());
  request.max_tokens = max_tokens;
  request.priority = priority;
  request.deadline = deadline.value_or(std::numeric_limits<double>::infinity());
  request.n = n;
  if (max_recursions.has_value() && *max_recursions < 1) {
    throw std::invalid_argument("max_recursions: expected at least 1, got " +
                                std::to_string(*max_recursions));
  }
  request.max_recursions = max_recursions.value_or(0);
  request.threshold = threshold;
  request.tenant = tenant;
  request.prefix_cache = prefix_cache;
  request.prompt_logits = prompt_logits;
  return self.add(std::move(request), now);
}

void report(Scheduler& self, const Bytes& decisions, const std::optional<Array<int64_t>>& tokens) {
  const uint8_t* bytes = decisions ? decisions->data() : nullptr;
  const size_t size = decisions ? static_cast<size_t>(decisions->size()) : 0;
  const Plan::Kind kind = self.pass().kind;
  if (kind != Plan::Kind::kExit && tokens) {
    throw std::invalid_argument(
        "tokens: expected none, as only an exit pass samples, got an array");
  }
  if (kind == Plan::Kind::kEnter) {
    self.report_enter(bytes, size);
  } else if (kind == Plan::Kind::kBlock) {
    self.report_block(bytes, size);
  } else {
    self.report_exit(tokens ? tokens->data() : nullptr,
                     tokens ? static_cast<size_t>(tokens->size()) : 0, bytes, size);
  }
}

// A view of a plan's vector, which lives as long as the plan.
template <typename T>
py::array_t<T> view(const std::shared_ptr<Plan>& plan, std::vector<T>& values,
                    std::vector<py::ssize_t> shape = {}) {
  if (shape.empty()) shape = {static_cast<py::ssize_t>(values.size())};
  return py::array_t<T>(shape, values.data(), py::cast(plan));
}

template <auto member>
auto array_of(const std::shared_ptr<Plan>& plan) {
  return view(plan, (*plan).*member);
}

const char* kind_name(const Plan& plan) {
  constexpr const char* names[] = {"idle", "enter", "block", "exit"};
  return names[static_cast<int>(plan.kind)];
}

py::object describe(const Scheduler& self, int64_t id) {
  const Sequence* s = self.sequence(id);
  if (s == nullptr) return py::none();
  constexpr const char* states[] = {"waiting", "enter", "block", "exit"};
  py::dict d;
  d["state"] = states[static_cast<int>(s->state)];
  d["tokens"] = s->request.tokens;
  d["done"] = s->done;
  d["counts"] = s->counts;
  d["depths"] = std::vector<int>(s->depths.begin(), s->depths.end());
  std::vector<std::vector<int32_t>> blocks;
  for (size_t g = 0; g < s->counts.size(); ++g) blocks.push_back(s->tables[static_cast<int>(g)]);
  d["blocks"] = blocks;
  return d;
}

void bind_plan(py::module_& m) {
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def_property_readonly("kind", &kind_name)
      .def_property_readonly("num_rows", &Plan::num_rows)
      .def_property_readonly("num_entries", &Plan::num_entries)
      .def_readonly("num_logit_rows", &Plan::num_logit_rows)
      .def_readonly("expected_seconds", &Plan::expected_seconds)
      .def_property_readonly("ids", &array_of<&Plan::ids>)
      .def_property_readonly("slots", &array_of<&Plan::slots>)
      .def_property_readonly("positions", &array_of<&Plan::positions>)
      .def_property_readonly("tokens", &array_of<&Plan::tokens>)
      .def_property_readonly("slot_mapping", &array_of<&Plan::slot_mapping>)
      .def_property_readonly(
          "write_through",
          [](const std::shared_ptr<Plan>& plan) {
            const py::ssize_t rows = plan->num_rows();
            const py::ssize_t size = static_cast<py::ssize_t>(plan->write_through.size());
            return view(plan, plan->write_through, {rows == 0 ? 0 : size / rows, rows});
          })
      .def_property_readonly("recursions", &array_of<&Plan::recursions>)
      .def_property_readonly("recursion_offsets", &array_of<&Plan::recursion_offsets>)
      .def_property_readonly("thresholds", &array_of<&Plan::thresholds>)
      .def_property_readonly("cu_seqlens", &array_of<&Plan::cu_seqlens>)
      .def_property_readonly("block_table",
                             [](const std::shared_ptr<Plan>& plan) {
                               return view(plan, plan->block_table,
                                           {plan->num_entries(), plan->max_blocks});
                             })
      .def_property_readonly("context_lens", &array_of<&Plan::context_lens>)
      .def_property_readonly("context_starts", &array_of<&Plan::context_starts>)
      .def_property_readonly("sample_rows", &array_of<&Plan::sample_rows>)
      .def_property_readonly("sample_ids", &array_of<&Plan::sample_ids>)
      .def_property_readonly("copy_sources", &array_of<&Plan::copy_sources>)
      .def_property_readonly("copy_destinations", &array_of<&Plan::copy_destinations>)
      .def_property_readonly("fresh_blocks", &array_of<&Plan::fresh_blocks>);
}

void bind_stats(py::module_& m) {
  py::class_<Stats>(m, "Stats")
      .def_readonly("running", &Stats::running)
      .def_readonly("waiting", &Stats::waiting)
      .def_readonly("blocks", &Stats::blocks)
      .def_readonly("blocks_free", &Stats::blocks_free)
      .def_readonly("blocks_cached", &Stats::blocks_cached)
      .def_readonly("block_passes", &Stats::block_passes)
      .def_readonly("ends_passes", &Stats::ends_passes)
      .def_readonly("block_rows", &Stats::block_rows)
      .def_readonly("exit_rows", &Stats::exit_rows)
      .def_readonly("enter_rows", &Stats::enter_rows)
      .def_readonly("sampled_tokens", &Stats::sampled_tokens)
      .def_readonly("preemptions", &Stats::preemptions)
      .def_readonly("prefix_tokens", &Stats::prefix_tokens)
      .def_readonly("prefix_hit_tokens", &Stats::prefix_hit_tokens)
      .def_readonly("exit_depths", &Stats::exit_depths)
      .def_readonly("growth_ratio", &Stats::growth_ratio);
}

}  // namespace
}  // namespace mor::host

PYBIND11_MODULE(_host, m) {
  using namespace mor::host;
  m.doc() = "Host-side classes of mor, free of tensors.";
  m.def("compiler", &compiler, "Name and version of the C++ compiler that built this module.");
  bind_plan(m);
  bind_stats(m);
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init(&make_scheduler), py::kw_only(), py::arg("num_blocks"),
           py::arg("block_size") = 16, py::arg("ends_block_tokens") = 0,
           py::arg("num_recursions") = 1, py::arg("router") = "none",
           py::arg("kv_strategy") = "recursion", py::arg("max_rows") = 64, py::arg("chunk") = 128,
           py::arg("policy") = "auto", py::arg("max_wait") = py::none(),
           py::arg("block_seconds") = Points(), py::arg("ends_seconds") = Points(),
           py::arg("aging_s") = 10.0, py::arg("watermark") = 0.01, py::arg("growth_ratio") = 0.5,
           py::arg("prefix_cache") = true, py::arg("window") = py::none(),
           py::arg("hash_bits") = 64)
      .def("add", &add, py::arg("tokens"), py::kw_only(), py::arg("max_tokens"), py::arg("now"),
           py::arg("priority") = 0, py::arg("deadline") = py::none(), py::arg("n") = 1,
           py::arg("max_recursions") = py::none(), py::arg("threshold") = 0.0,
           py::arg("tenant") = 0, py::arg("prefix_cache") = true, py::arg("prompt_logits") = false)
      .def("abort", &Scheduler::abort, py::arg("id"))
      .def(
          "plan",
          [](Scheduler& self, double now) { return std::const_pointer_cast<Plan>(self.plan(now)); },
          py::arg("now"))
      .def("report", &report, py::arg("decisions") = py::none(), py::arg("tokens") = py::none())
      .def("take_finished", &Scheduler::take_finished)
      .def_property_readonly(
          "num_slots",
          [](const Scheduler& self) { return self.options().max_rows + self.options().chunk; })
      .def_property_readonly("has_work", &Scheduler::has_work)
      .def_property_readonly("in_flight", &Scheduler::in_flight)
      .def("stats", &Scheduler::stats)
      .def("describe", &describe, py::arg("id"))
      .def("check", &Scheduler::check);
}
