#include "cpu/amx.h"

#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/fork.h"
#include "base/format.h"
#include "base/machine.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heed::cpu {
namespace {

std::string ask() {
  if (!machine().cpu.amx_bf16) return "needs a CPU with AMX BF16";
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  if (::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return {};
  return heed::format("the operating system does not grant AMX tiles to this process: {}", std::strerror(errno));
#else
  return "knows how to ask for AMX tiles on Linux only";
#endif
}

}  // namespace

const std::string& amx_refusal() {
  static constinit std::atomic<bool> ready{false};
  return made_once(ready, []() -> const std::string& {
    static const std::string instance = ask();
    return instance;
  });
}

}  // namespace heed::cpu
