// Whether this process may use AMX: eight tiles of 16 rows by 64 bytes, and products of bf16 pairs between them.
#pragma once

#include <string>

namespace heed::cpu {

// Empty: it may. Else the sentence why not. The operating system is asked for the tiles' state at the first call, once:
// the permission is the whole process's, and stack frames of its signals grow with it, so nobody asks who does not need
// it.
const std::string& amx_refusal();

}  // namespace heed::cpu
