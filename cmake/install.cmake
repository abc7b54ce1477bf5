# Installed: library, headers, CMake package, pkg-config file.
include(CMakePackageConfigHelpers)
install(TARGETS heed EXPORT heedTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/heed DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
