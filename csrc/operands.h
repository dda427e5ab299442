// What the operands of an operator must be, written once. C++ checks every call by it. Python
// (mor/ops/_checks.py) reads it from the library and checks the fake tensors of a trace by it: their
// sizes may be symbols, which C++ does not see.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "checks.h"

namespace mor {

struct Operand {
  const char* name;
  // "[N, D]". A name is one size in all operands of an operator; "B + 1" is one more than B, so at
  // least 1. "" stands for any rank.
  const char* shape;
  // As the error lists them, "int64, int32 or bool". "floating" and "any" stand for several; "same"
  // is the dtype of the first operand; "sums" is float64 where that is float64, else float32.
  const char* dtypes;
  // The error about sizes. "" gives "x of 3 elements" or "x of shape [3, 2]"; "(the rows of y)" is
  // put behind that; another text replaces it. There {y} is the shape of y and {y[0]} its first
  // size, and the first word is the operand whose shape came.
  const char* sizes = "";
};

// The operands of one operator in the order in which they are checked, all of them on the device of
// the first, which is never absent.
class Operands {
 public:
  template <size_t kCount>
  consteval Operands(const char* op, const Operand (&operands)[kCount]);

  // Null stands for an absent operand.
  void check(std::initializer_list<const Tensor*> tensors) const;

  // For Python: the name of the operator, then a line for each operand, with tabs between fields.
  std::string text() const;

 private:
  static constexpr ScalarType kDtypes[] = {
      ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double,
      ScalarType::Long,  ScalarType::Int,      ScalarType::Bool};
  static constexpr int kMaxOperands = 10, kMaxRank = 4, kMaxSizes = 8;
  struct Rule {
    Operand text;
    int rank = -1;
    std::array<int8_t, kMaxRank> size{}, plus{};  // which of the named sizes, and what is added
    uint64_t dtypes = 0;                          // bits by ScalarType
    bool same = false, sums = false;
  };
  using Sizes = std::array<int64_t, kMaxSizes>;

  [[noreturn]] void refuse_sizes(int at, const Tensor* const* tensors, const Sizes& sizes) const;

  const char* op_;
  int count_ = 0;
  std::array<Rule, kMaxOperands> rules_{};
};

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// The next word of a shape or of dtypes, taken off its front; "" at the end.
constexpr std::string_view pop(std::string_view& rest, const char* separators) {
  rest.remove_prefix(std::min(rest.find_first_not_of(" ,[]"), rest.size()));
  const std::string_view word = rest.substr(0, rest.find_first_of(separators));
  rest.remove_prefix(word.size());
  return word;
}

template <size_t kCount>
consteval Operands::Operands(const char* op, const Operand (&operands)[kCount]) : op_(op) {
  std::array<std::string_view, kMaxSizes> names;
  for (const Operand& operand : operands) {
    Rule& rule = rules_.at(count_++);
    rule.text = operand;
    std::string_view rest = operand.shape;
    rule.rank = rest.empty() ? -1 : 0;
    for (auto name = pop(rest, ",]"); !name.empty(); name = pop(rest, ",]"), ++rule.rank) {
      rule.plus.at(rule.rank) = name.ends_with(" + 1");
      if (name.ends_with(" + 1")) name.remove_suffix(4);
      int at = 0;
      while (!names.at(at).empty() && names[at] != name) ++at;
      names[at] = name;
      rule.size[rule.rank] = at;
    }
    rest = operand.dtypes;
    for (auto word = pop(rest, " ,"); !word.empty(); word = pop(rest, " ,")) {
      rule.same |= word == "same";
      rule.sums |= word == "sums";
      bool known = word == "same" || word == "sums" || word == "or";
      for (const ScalarType dtype : kDtypes) {
        if (word != dtype_str(dtype) && (word != "floating" || !is_floating(dtype))) continue;
        rule.dtypes |= uint64_t{1} << int(dtype);
        known = true;
      }
      if (word == "any") rule.dtypes = ~uint64_t{0}, known = true;
      if (!known) throw "no such dtype";
    }
  }
}

inline void replace(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at; (at = text.find(from)) != std::string::npos;) text.replace(at, from.size(), to);
}

inline void Operands::check(std::initializer_list<const Tensor*> tensors) const {
  MOR_CHECK(int(tensors.size()) == count_, op_, ": expected ", count_, " operands to check, got ",
            tensors.size());
  Sizes sizes;
  sizes.fill(-1);
  const Tensor& first = **tensors.begin();
  const auto device = first.device();
  const ScalarType same = first.scalar_type();
  const ScalarType sums = same == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (int i = 0; i < count_; ++i) {
    const Rule& rule = rules_[i];
    if (tensors.begin()[i] == nullptr) continue;
    const Tensor& t = *tensors.begin()[i];
    const char* name = rule.text.name;
    const auto shape = t.sizes();
    MOR_CHECK(rule.rank < 0 || int(shape.size()) == rule.rank, op_, ": expected ", name,
              " of shape ", rule.text.shape, ", got ", shape_str(t));
    const ScalarType dtype = i == 0 ? same : t.scalar_type();
    if (!(rule.dtypes >> int(dtype) & 1) && !(rule.same && dtype == same) &&
        !(rule.sums && dtype == sums)) [[unlikely]] {
      std::string expected = rule.text.dtypes;
      replace(expected, "floating", "float32, bfloat16, float16 or float64");
      replace(expected, "same", dtype_str(same));
      replace(expected, "sums", dtype_str(sums));
      MOR_CHECK(false, op_, ": expected ", name, " of dtype ", expected, ", got ",
                dtype_str(dtype));
    }
    MOR_CHECK(i == 0 || t.device() == device, op_, ": expected ", name, " on ", device_str(first),
              ", got ", device_str(t));
    bool fits = true;
    for (int d = 0; d < rule.rank; ++d) {
      const int64_t size = shape[d] - rule.plus[d];
      MOR_CHECK(size >= 0, op_, ": expected ", name, " of at least one element, got [0]");
      int64_t& expected = sizes[rule.size[d]];
      if (expected < 0) expected = size;
      fits &= size == expected;
    }
    if (!fits) [[unlikely]]
      refuse_sizes(i, tensors.begin(), sizes);
  }
}

inline void Operands::refuse_sizes(int at, const Tensor* const* tensors, const Sizes& sizes) const {
  const Rule& rule = rules_[at];
  std::string text = rule.text.sizes, shape, subject = rule.text.name;
  for (int d = 0; d < rule.rank; ++d)
    shape += (d ? ", " : "") + std::to_string(sizes[rule.size[d]] + rule.plus[d]);
  const std::string usual =
      rule.rank == 1 ? " of " + shape + " elements" : " of shape [" + shape + "]";
  if (text.empty() || text[0] == '(') text = subject + usual + (text.empty() ? "" : " ") + text;
  subject = text.substr(0, text.find(' '));
  for (int i = 0; i < count_; ++i) {
    if (tensors[i] == nullptr) continue;
    const std::string name = rules_[i].text.name;
    replace(text, "{" + name + "}", shape_str(*tensors[i]));
    for (int d = 0; d < rules_[i].rank; ++d)
      replace(text, "{" + name + "[" + std::to_string(d) + "]}",
              std::to_string(tensors[i]->size(d)));
    if (name == subject) shape = shape_str(*tensors[i]);
  }
  throw std::runtime_error(message(op_, ": expected ", text, ", got ", shape));
}

inline std::string Operands::text() const {
  std::string all = op_;
  for (int i = 0; i < count_; ++i) {
    const Operand& o = rules_[i].text;
    all += message("\n", o.name, "\t", o.shape, "\t", o.dtypes, "\t", o.sizes);
  }
  return all;
}

}  // namespace mor
