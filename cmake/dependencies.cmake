# What heed builds with: the system's package first, a download only where there is none.
include(FetchContent)
find_package(Threads REQUIRED)

# fmt: its sources are compiled into the library (src/base/format.cpp), so only headers are needed.
find_package(fmt 9 QUIET)
if(NOT TARGET fmt::fmt)
  FetchContent_Declare(fmt GIT_REPOSITORY https://github.com/fmtlib/fmt GIT_TAG 9.1.0)
  FetchContent_MakeAvailable(fmt)
endif()
get_target_property(fmt_includes fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
add_library(fmt_headers INTERFACE)
target_include_directories(fmt_headers SYSTEM INTERFACE ${fmt_includes})

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
