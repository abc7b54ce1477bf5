#include "cpu/attention_fwd_bf16.h"
namespace heed::cpu { const Bf16Tiles* bf16_tiles() { return nullptr; } }
