# The GPU kernels' sources as strings inside the library: heed hands them to NVRTC in memory and needs no file at
# run time. Included by CMakeLists.txt it defines heed_embed_kernels(OUTPUT FILES...); run as a script it writes the
# C++ file (cmake -DOUTPUT=... -DFILES=... -P).
if(CMAKE_SCRIPT_MODE_FILE)
  set(arrays "")
  set(rows "")
  set(index 0)
  foreach(file IN LISTS FILES)
    get_filename_component(name "${file}" NAME)
    file(READ "${file}" text)
    string(APPEND arrays "constexpr char kText${index}[] = R\"kernel(${text})kernel\";\n")
    string(APPEND rows "    {\"${name}\", kText${index}},\n")
    math(EXPR index "${index} + 1")
  endforeach()
  file(WRITE "${OUTPUT}" "// Written by cmake/embed_kernels.cmake.
#include \"cuda/jit.h\"

namespace heed::cuda {
namespace {

${arrays}
const EmbeddedFile kFiles[] = {
${rows}};

}  // namespace

const EmbeddedFile* embedded_files(size_t& count) {
  count = ${index};
  return kFiles;
}

}  // namespace heed::cuda
")
  return()
endif()

set(HEED_EMBED_SCRIPT ${CMAKE_CURRENT_LIST_FILE})

function(heed_embed_kernels output)
  add_custom_command(
    OUTPUT ${output}
    COMMAND ${CMAKE_COMMAND} -DOUTPUT=${output} "-DFILES=${ARGN}" -P ${HEED_EMBED_SCRIPT}
    DEPENDS ${ARGN} ${HEED_EMBED_SCRIPT}
    COMMENT "Embedding the GPU kernels' sources"
    VERBATIM)
endfunction()
