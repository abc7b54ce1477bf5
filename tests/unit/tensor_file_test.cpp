// Tensor files: what is written reads the same, NumPy's own spellings are understood, and each way a file can be wrong
// gets its own sentence.
#include "tensor_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "npy.h"
#include "safetensors.h"

namespace heed::cli {
namespace {

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

std::string npy_text(const std::string& header, const std::string& data, char version = 1) {
  std::string text = "\x93NUMPY";
  text += version;
  text += '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) text += static_cast<char>(header.size() >> (8 * i));
  return text + header + data;
}

std::string dictionary(const std::string& descr, const std::string& shape, const std::string& fortran = "False") {
  return "{'descr': " + descr + ", 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}

std::string safetensors_text(const std::string& header, const std::string& data) {
  std::string text;
  for (int i = 0; i < 8; ++i) text += static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i));
  return text + header + data;
}

// The sentence with which reading fails; "" if it does not.
std::string npy_complaint(const std::string& file) {
  try {
    read_npy(bytes_of(file));
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

std::string safetensors_complaint(const std::string& file) {
  try {
    read_safetensors(bytes_of(file));
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_SAYS(sentence, part) EXPECT_NE((sentence).find(part), std::string::npos) << (sentence)

Tensor counting(ElementType type, std::vector<int64_t> shape) {
  Tensor tensor(type, std::move(shape));
  for (size_t i = 0; i < tensor.data.size(); ++i) {
    tensor.data.data()[i] = static_cast<std::byte>(type == ElementType::kBool ? i & 1 : 7 * i + 3);
  }
  return tensor;
}

void expect_same(const Tensor& got, const Tensor& want) {
  EXPECT_EQ(got.type, want.type);
  EXPECT_EQ(got.shape, want.shape);
  ASSERT_EQ(got.data.size(), want.data.size());
  EXPECT_EQ(std::memcmp(got.data.data(), want.data.data(), want.data.size()), 0);
}

constexpr ElementType kTypes[] = {ElementType::kBool, ElementType::kI32, ElementType::kI64, ElementType::kF16,
                                  ElementType::kBf16, ElementType::kF32, ElementType::kF64};

class TensorFileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / ("heed_tensor_file_test_" + std::to_string(::getpid()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string save(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }
  static std::string complaint(const std::string& ref) {
    try {
      read_tensor(parse_tensor_ref(ref));
    } catch (const FileError& error) {
      return error.what();
    }
    return "";
  }

  std::filesystem::path folder_;
};

// ---- round trips ----------------------------------------------------------------------------------------------------

TEST_F(TensorFileTest, EveryTypeAndShapeComesBack) {
  const std::vector<std::vector<int64_t>> shapes = {{}, {1}, {5}, {2, 3}, {0, 4}, {2, 1, 3, 4}};
  for (const std::string ending : {".npy", ".npz", ".safetensors"}) {
    for (const ElementType type : kTypes) {
      for (const auto& shape : shapes) {
        SCOPED_TRACE(ending + " " + std::string(element_name(type)) + " " + shape_text(shape));
        const Tensor tensor = counting(type, shape);
        write_tensors(path("one" + ending), {{"x", tensor}});
        expect_same(read_tensor({path("one" + ending), ending == ".npy" ? "" : "x"}), tensor);
        expect_same(read_tensor({path("one" + ending), ""}), tensor);
      }
    }
  }
}

TEST_F(TensorFileTest, ManyTensorsInOneFile) {
  for (const std::string ending : {".npz", ".safetensors"}) {
    NamedTensors tensors;
    for (const ElementType type : kTypes) tensors["layer." + std::string(element_name(type))] = counting(type, {3, 5});
    write_tensors(path("many" + ending), tensors);
    EXPECT_EQ(tensor_names(path("many" + ending)).size(), std::size(kTypes));
    for (const auto& [name, tensor] : tensors) expect_same(read_tensor({path("many" + ending), name}), tensor);
  }
}

TEST_F(TensorFileTest, DataIsAlignedInMemoryAndInFiles) {
  const Tensor tensor = counting(ElementType::kF32, {3});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data.data()) % 128, 0u);
  EXPECT_EQ(make_npy_header(ElementType::kF32, tensor.shape).size() % 64, 0u);
  std::vector<const Tensor*> order;
  EXPECT_EQ(make_safetensors_header({{"x", tensor}}, order).size() % 8, 0u);
}

// ---- .npy -----------------------------------------------------------------------------------------------------------

TEST(Npy, SpellingsOfNumPyAreRead) {
  const std::string data(8, '\1');
  const auto read = [&](const std::string& text) { return read_npy(bytes_of(text)); };
  EXPECT_EQ(read(npy_text(dictionary("'<f4'", "(2,)"), data)).shape, std::vector<int64_t>{2});
  EXPECT_EQ(read(npy_text(dictionary("'<f4'", "(2,)") + std::string(30, ' ') + "\n", data, 2)).shape,
            std::vector<int64_t>{2});
  EXPECT_EQ(read(npy_text(dictionary("\"<f4\"", "( 1 , 2L )"), data, 3)).shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(read(npy_text("{'shape':(),'fortran_order':True,'descr':'<f8'}", data)).type, ElementType::kF64);
  for (const char* spelling : {"'<V2'", "'|V2'", "'V2'"}) {
    EXPECT_EQ(read(npy_text(dictionary(spelling, "(4,)"), data)).type, ElementType::kBf16);
  }
}

TEST(Npy, FortranOrderBecomesCOrder) {
  // f32 [2, 3] in Fortran order: columns one after another.
  const float columns[] = {0, 10, 1, 11, 2, 12};
  std::string data(sizeof columns, '\0');
  std::memcpy(data.data(), columns, sizeof columns);
  const Tensor tensor = read_npy(bytes_of(npy_text(dictionary("'<f4'", "(2, 3)", "True"), data)));
  const float want[] = {0, 1, 2, 10, 11, 12};
  EXPECT_EQ(std::memcmp(tensor.data.data(), want, sizeof want), 0);
}

TEST(Npy, EveryFaultHasASentence) {
  const std::string good = npy_text(dictionary("'<f4'", "(2,)"), std::string(8, '\0'));
  ASSERT_EQ(npy_complaint(good), "");
  EXPECT_SAYS(npy_complaint(""), "no .npy file");
  EXPECT_SAYS(npy_complaint("PK\3\4 something else"), "no .npy file");
  EXPECT_SAYS(npy_complaint(good.substr(0, 30)), "truncated inside its .npy header");
  EXPECT_SAYS(npy_complaint(npy_text("", "", 2).substr(0, 11)), "truncated inside its .npy header");
  EXPECT_SAYS(npy_complaint(good.substr(0, good.size() - 1)), "truncated: shape [2] of f32 needs 8 bytes, 7 are there");
  EXPECT_SAYS(npy_complaint(good + "x"), "1 bytes after its data");
  EXPECT_SAYS(npy_complaint(npy_text(dictionary("'<f4'", "(2,)"), "", 9)), "version is 9");
  std::string long_header = npy_text("", "", 2);
  long_header[11] = '\x7f';
  EXPECT_SAYS(npy_complaint(long_header), "more than 65536 is no array's");

  const auto header_complaint = [](const std::string& header) {
    return npy_complaint(npy_text(header, std::string(8, '\0')));
  };
  EXPECT_SAYS(header_complaint("no dictionary"), "lacks a '{'");
  EXPECT_SAYS(header_complaint("{'descr': '<f4', 'shape': (2,), }"), "lacks one of descr, fortran_order, shape");
  EXPECT_SAYS(header_complaint("{'descr': '<f4', 'descr': '<f4'}"), "'descr' twice");
  EXPECT_SAYS(header_complaint("{'colour': 'red'}"), "'colour'");
  EXPECT_SAYS(header_complaint("{'descr': '<f4"), "quote that does not end");
  EXPECT_SAYS(header_complaint("{'descr': '<f\x01'}"), "unprintable");
  EXPECT_SAYS(header_complaint("{'descr': 4}"), "quoted name");
  EXPECT_SAYS(header_complaint("{'descr': '<f4' 'shape': ()}"), "comma or a closing brace");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(2,)", "1")), "other than True or False");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(-2,)")), "no size");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(99999999999999999999,)")), "no size");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(2 3)")), "no tuple");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(2,)") + "more"), "after its closing brace");
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", "(4294967296, 4294967296)")), "larger than any memory");
  std::string many = "(";
  for (int i = 0; i < 33; ++i) many += "1,";
  EXPECT_SAYS(header_complaint(dictionary("'<f4'", many + ")")), "more than 32 dimensions");
  EXPECT_SAYS(header_complaint(dictionary("'>f4'", "(2,)")), "big-endian");
  EXPECT_SAYS(header_complaint(dictionary("'<u2'", "(4,)")), "dtype is '<u2'");
  EXPECT_SAYS(header_complaint(dictionary("[('x', '<f4')]", "(2,)")), "records");
}

// ---- .safetensors ---------------------------------------------------------------------------------------------------

std::string entry(const std::string& dtype, const std::string& shape, int begin, int end) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[)" + std::to_string(begin) + "," +
         std::to_string(end) + "]}";
}

TEST(Safetensors, EveryFaultHasASentence) {
  const std::string four(4, '\0'), eight(8, '\0');
  const std::string one = entry("F32", "[1]", 0, 4);
  ASSERT_EQ(safetensors_complaint(safetensors_text("{\"a\":" + one + "}", four)), "");
  ASSERT_EQ(safetensors_complaint(safetensors_text("{}  ", "")), "");
  EXPECT_SAYS(safetensors_complaint("1234567"), "too short");
  EXPECT_SAYS(safetensors_complaint(std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8)), "at most 100000000 are legal");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("{}", "").substr(0, 9)),
              "truncated inside its safetensors header");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("", "")), "does not start with '{'");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("[1]", "")), "does not start with '{'");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("{\"a\"", "")), "no JSON object");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("{\"a\":" + one + ",\"a\":" + one + "}", four)), "'a' twice");
  EXPECT_SAYS(safetensors_complaint(safetensors_text("{\"a\":[[[[[[1]]]]]]}", "")), "nests too deeply");
  const auto fault = [&](const std::string& value, const std::string& data) {
    return safetensors_complaint(safetensors_text("{\"a\":" + value + "}", data));
  };
  EXPECT_SAYS(fault("3", four), "lacks one of dtype, shape, data_offsets");
  EXPECT_SAYS(fault(R"({"dtype":"F32","shape":[1]})", four), "lacks one of dtype, shape, data_offsets");
  EXPECT_SAYS(fault(R"({"dtype":4,"shape":[1],"data_offsets":[0,4]})", four), "dtype that is no name");
  EXPECT_SAYS(fault(entry("F32", "[-1]", 0, 4), four), "no list of sizes");
  EXPECT_SAYS(fault(entry("F32", "[1.5]", 0, 4), four), "no list of sizes");
  EXPECT_SAYS(fault(entry("F32", "1", 0, 4), four), "no list of sizes");
  EXPECT_SAYS(fault(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", four), "no two sizes");
  EXPECT_SAYS(fault(entry("F32", "[1]", 4, 0), four), "offsets are wrong");
  EXPECT_SAYS(fault(entry("F32", "[2]", 0, 8), four), "the file is truncated");
  EXPECT_SAYS(fault(entry("F32", "[2]", 0, 4), four), "needs 8 bytes, its offsets give 4");
  EXPECT_SAYS(fault(entry("F32", "[4294967296,4294967296]", 0, 4), four), "larger than any memory");
  EXPECT_SAYS(fault(one, eight), "4 bytes at its end belong to no tensor");
  EXPECT_SAYS(fault(entry("F32", "[1]", 4, 8), eight), "4 bytes before tensor 'a' belong to none");
  EXPECT_SAYS(
      safetensors_complaint(safetensors_text(
          "{\"a\":" + entry("F32", "[2]", 0, 8) + ",\"b\":" + entry("F32", "[2]", 4, 12) + "}", std::string(12, '\0'))),
      "tensor 'b' overlaps");
}

TEST_F(TensorFileTest, ATypeThatHeedCannotUseIsLegalBesideOthers) {
  const std::string header = "{\"__metadata__\":{\"format\":\"pt\"},\"a\":" + entry("F8_E4M3", "[4]", 0, 4) +
                             ",\"b\":" + entry("F32", "[1]", 4, 8) + "}";
  const std::string file = save("mixed.safetensors", safetensors_text(header, std::string(8, '\0')));
  EXPECT_EQ(tensor_names(file), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(read_tensor({file, "b"}).type, ElementType::kF32);
  EXPECT_SAYS(complaint(file + ":a"), "tensor 'a' has dtype F8_E4M3; heed reads F16, BF16");
}

// ---- files and names ------------------------------------------------------------------------------------------------

TEST_F(TensorFileTest, SentencesNameTheFile) {
  EXPECT_EQ(complaint(path("none.npy")), path("none.npy") + ": No such file or directory");
  EXPECT_SAYS(complaint(path("picture.png")), "picture.png: No such file");
  EXPECT_SAYS(complaint(save("picture.png", "x")), "ends in none of .npy, .npz, .safetensors");
  std::filesystem::create_directory(path("folder.npy"));
  EXPECT_SAYS(complaint(path("folder.npy")), "no regular file");
  EXPECT_SAYS(complaint(save("text.npy", "hello")), "text.npy: it is no .npy file");
  EXPECT_SAYS(complaint(save("text.npz", "hello")), "no readable .npz archive");
  write_tensors(path("one.npy"), {{"x", counting(ElementType::kF32, {2})}});
  EXPECT_SAYS(complaint(path("one.npy") + ":x"), "holds one tensor without a name; 'x' was asked for");
  for (const std::string ending : {".npz", ".safetensors"}) {
    write_tensors(path("two" + ending),
                  {{"a", counting(ElementType::kF32, {2})}, {"b", counting(ElementType::kF32, {2})}});
    EXPECT_SAYS(complaint(path("two" + ending)), "say which tensor, FILE:NAME; it holds: a, b");
    EXPECT_SAYS(complaint(path("two" + ending) + ":c"), "it has no tensor 'c'; it holds: a, b");
  }
}

TEST_F(TensorFileTest, DamagedArchivesAreRefused) {
  write_tensors(path("x.npz"), {{"a", counting(ElementType::kF32, {64})}});
  std::ifstream file(path("x.npz"), std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(file)), {});
  std::string flipped = good;
  flipped[good.find("NUMPY") + 200] ^= 1;  // an element: the checksum is wrong
  EXPECT_SAYS(complaint(save("flipped.npz", flipped)), "tensor 'a'");
  for (size_t cut = 0; cut < good.size(); cut += 7)
    EXPECT_NE(complaint(save("cut.npz", good.substr(0, cut))), "") << cut;
}

TEST_F(TensorFileTest, WritingComplainsToo) {
  const Tensor tensor = counting(ElementType::kF32, {2});
  EXPECT_THROW(write_tensors(path("no/such/folder.npy"), {{"x", tensor}}), FileError);
  EXPECT_THROW(write_tensors(path("no/such/folder.npz"), {{"x", tensor}}), FileError);
  EXPECT_THROW(write_tensors(path("two.npy"), {{"x", tensor}, {"y", tensor}}), FileError);
  EXPECT_THROW(write_tensors(path("x.txt"), {{"x", tensor}}), FileError);
  EXPECT_THROW(write_tensors("/dev/full/x.npy", {{"x", tensor}}), FileError);
}

TEST(TensorRef, TheColonCountsAfterTheEnding) {
  const auto parsed = [](const char* text) {
    const TensorRef ref = parse_tensor_ref(text);
    return ref.path + " | " + ref.name;
  };
  EXPECT_EQ(parsed("a.npy"), "a.npy | ");
  EXPECT_EQ(parsed("a.npz:q"), "a.npz | q");
  EXPECT_EQ(parsed("c:/x/a.safetensors:model.0:q"), "c:/x/a.safetensors | model.0:q");
  EXPECT_EQ(parsed("a:b.npy"), "a:b.npy | ");
}

// ---- elements -------------------------------------------------------------------------------------------------------

TEST(Elements, HalvesGoToFloatAndBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const bool is_nan = (bits & 0x7c00) == 0x7c00 && (bits & 0x3ff) != 0;
    EXPECT_EQ(std::isnan(half_to_float(half)), is_nan);
    if (!is_nan) {
      EXPECT_EQ(float_to_half(half_to_float(half)), half);
    }
    if (!std::isnan(bfloat_to_float(half))) {
      EXPECT_EQ(float_to_bfloat(bfloat_to_float(half)), half);
    }
  }
  EXPECT_TRUE(std::isnan(bfloat_to_float(float_to_bfloat(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Elements, RoundingIsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {  // between every two finite neighbours
    const float low = half_to_float(static_cast<uint16_t>(bits)), high = half_to_float(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    const auto even = static_cast<uint16_t>(bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(float_to_half(middle), even);
    ASSERT_EQ(float_to_half(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(float_to_half(std::nextafter(middle, high)), bits + 1);
  }
  EXPECT_EQ(float_to_half(65519.9f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_bfloat(1.0f + 0x1p-8f), 0x3f80);      // half way, down to even
  EXPECT_EQ(float_to_bfloat(1.0f + 3 * 0x1p-8f), 0x3f82);  // half way, up to even
  EXPECT_EQ(float_to_bfloat(std::numeric_limits<float>::max()), 0x7f80);
}

TEST(Elements, ConversionsThatLoseMeaningAreRefused) {
  Tensor lengths(ElementType::kI64, {2});
  lengths.as<int64_t>()[1] = 70000;
  EXPECT_EQ(convert(lengths, ElementType::kI32).as<int32_t>()[1], 70000);
  lengths.as<int64_t>()[1] = int64_t{1} << 31;
  EXPECT_THROW(convert(lengths, ElementType::kI32), FileError);
  EXPECT_THROW(convert(Tensor(ElementType::kF32, {1}), ElementType::kI32), FileError);
  EXPECT_THROW(convert(Tensor(ElementType::kBool, {1}), ElementType::kF32), FileError);
  EXPECT_THROW(Tensor(ElementType::kF32, {-1}), FileError);
}

TEST(Elements, AMovedTensorLeavesNothingBehind) {
  Tensor tensor = counting(ElementType::kF32, {4});
  const Tensor moved = std::move(tensor);
  EXPECT_EQ(tensor.data.size(), 0u);  // NOLINT(bugprone-use-after-move)
  EXPECT_EQ(moved.num_elements(), 4);
}

}  // namespace
}  // namespace heed::cli
