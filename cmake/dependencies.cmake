# What heed builds with: the system's package first, a download only where there is none.
include(FetchContent)
find_package(Threads REQUIRED)

# fmt: what heed uses of it is compiled into the library (src/base/format.cpp), so only headers are needed.
find_path(FMT_INCLUDE_DIR fmt/core.h)
if(NOT FMT_INCLUDE_DIR)
  FetchContent_Declare(fmt GIT_REPOSITORY https://github.com/fmtlib/fmt GIT_TAG 9.1.0)
  FetchContent_GetProperties(fmt)
  if(NOT fmt_POPULATED)
    FetchContent_Populate(fmt)
  endif()
  set(FMT_INCLUDE_DIR ${fmt_SOURCE_DIR}/include)
endif()
add_library(fmt_headers INTERFACE)
target_include_directories(fmt_headers SYSTEM INTERFACE ${FMT_INCLUDE_DIR})

# Google Highway: headers only, compiled once per instruction set; heed picks the set itself, so libhwy is not needed.
find_path(HWY_INCLUDE_DIR hwy/highway.h)
if(NOT HWY_INCLUDE_DIR)
  FetchContent_Declare(highway GIT_REPOSITORY https://github.com/google/highway GIT_TAG 1.2.0)
  FetchContent_GetProperties(highway)
  if(NOT highway_POPULATED)
    FetchContent_Populate(highway)
  endif()
  set(HWY_INCLUDE_DIR ${highway_SOURCE_DIR})
endif()
add_library(hwy_headers INTERFACE)
target_include_directories(hwy_headers SYSTEM INTERFACE ${HWY_INCLUDE_DIR})
