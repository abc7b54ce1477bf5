// Attention whose tensors come from files: reads them, fits them together, and makes the outputs. The backward pass's
// `out` and `lse` are those of the forward pass, run here.
#pragma once

#include "commands.h"
#include "heed/heed.h"

namespace heed::cli {

class LoadedAttention {
 public:
  // `lse`: the log-sum-exp of every row is an output too. UsageError for options that contradict each other, FileError
  // for files and what is in them.
  LoadedAttention(const AttentionFiles& files, bool lse);
  LoadedAttention(const LoadedAttention&) = delete;
  LoadedAttention& operator=(const LoadedAttention&) = delete;

  const heed_attention_args& arguments() const { return arguments_; }
  // Tensor name and FILE:NAME, in the order q, k, v, ...
  const std::vector<std::pair<std::string, std::string>>& sources() const { return sources_; }
  // An output in the shape of the inputs: a batch dimension that was added is dropped again.
  Tensor as_given(const std::string& name, const Tensor& output) const;

 private:
  void read_tensors(const AttentionFiles& files);
  std::string source_of(const std::string& name) const;
  void fit_shapes();
  void set_options(const AttentionFiles& files);
  void make_outputs(const AttentionFiles& files, bool lse);
  void make_gradients();

  NamedTensors inputs_;
  std::vector<std::pair<std::string, std::string>> sources_;
  Tensor out_, lse_;
  NamedTensors gradients_;
  heed_attention_args arguments_ = {};
  bool batch_added_ = false;
};

}  // namespace heed::cli
