# Cross-compiles for 64-bit Arm with Debian's compiler and runs what comes out under qemu: tests of the NEON kernels.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
# Headers of Highway and fmt are the same for every architecture; the rest of /usr/include is not, so they are linked apart.
set(headers ${CMAKE_BINARY_DIR}/headers)
file(MAKE_DIRECTORY ${headers})
foreach(library hwy fmt)
  file(CREATE_LINK /usr/include/${library} ${headers}/${library} SYMBOLIC)
endforeach()
set(HWY_INCLUDE_DIR ${headers} CACHE PATH "")
set(FMT_INCLUDE_DIR ${headers} CACHE PATH "")
