# cmake -DBUILD_DIR=<heed's build> -DSOURCE_DIR=<this folder> -DSCRATCH_DIR=<empty or absent> -P run.cmake
# Installs heed, moves the installed tree, and builds and runs programs against it: with find_package, and with pkg-config.
cmake_minimum_required(VERSION 3.25)

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY COMMAND_ECHO STDOUT)
endfunction()

file(REMOVE_RECURSE ${SCRATCH_DIR})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${SCRATCH_DIR}/first)
file(RENAME ${SCRATCH_DIR}/first ${SCRATCH_DIR}/prefix)
set(prefix ${SCRATCH_DIR}/prefix)

if(SANITIZE)
  set(flags -fsanitize=${SANITIZE})
endif()
run(${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${SCRATCH_DIR}/build -G ${GENERATOR} -DCMAKE_PREFIX_PATH=${prefix}
    -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_C_FLAGS=${flags} -DCMAKE_CXX_FLAGS=${flags})
run(${CMAKE_COMMAND} --build ${SCRATCH_DIR}/build)
run(${SCRATCH_DIR}/build/consumer_c)
run(${SCRATCH_DIR}/build/consumer_cpp)

find_program(PKG_CONFIG NAMES pkg-config pkgconf REQUIRED)
file(GLOB_RECURSE pc_file ${prefix}/*/heed.pc)
cmake_path(GET pc_file PARENT_PATH pc_dir)
set(ENV{PKG_CONFIG_PATH} ${pc_dir})
execute_process(COMMAND ${PKG_CONFIG} --cflags --libs heed OUTPUT_VARIABLE options OUTPUT_STRIP_TRAILING_WHITESPACE
                COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(options UNIX_COMMAND "${options}")
execute_process(COMMAND ${PKG_CONFIG} --variable=libdir heed OUTPUT_VARIABLE libdir OUTPUT_STRIP_TRAILING_WHITESPACE)
run(${CC} -std=c11 ${flags} ${SOURCE_DIR}/consumer.c ${options} -Wl,-rpath,${libdir} -o ${SCRATCH_DIR}/consumer_pkg_config)
run(${SCRATCH_DIR}/consumer_pkg_config)
file(REMOVE_RECURSE ${SCRATCH_DIR})
