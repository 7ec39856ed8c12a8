# Builds libdeltanet's gated delta net into the CUDA backend of llama.cpp or ik_llama.cpp, whose sources stay as they are:
#
#     cmake -B build -DGGML_CUDA=ON -DCMAKE_PROJECT_ggml_INCLUDE=<this file> [-DDELTANET_KIND=static]
#
# CMake reads it at ggml's project(). The one file of the backend that has the operator is replaced by the one beside
# this, and the backend is linked with libdeltanet. Nothing else is compiled in another way. Needs CMake 3.19.
# SPDX-License-Identifier: MIT
cmake_policy(VERSION 3.19)

set(DELTANET_KIND shared CACHE STRING "Which deltanet to link: shared or static")
# This file is installed in <prefix>/share/doc/deltanet/examples/ggml-cuda.
get_filename_component(_deltanet_prefix "${CMAKE_CURRENT_LIST_DIR}/../../../../.." ABSOLUTE)
find_package(deltanet 0.1 REQUIRED COMPONENTS ${DELTANET_KIND} HINTS "${_deltanet_prefix}")
set(DELTANET_GGML_CUDA "${CMAKE_CURRENT_LIST_DIR}")

# The library without its headers: those are for one file alone. The flags of the others stay, and with them what was
# compiled before.
string(TOUPPER ${DELTANET_KIND} _deltanet_type)
add_library(deltanet_library ${_deltanet_type} IMPORTED)
foreach(_deltanet_property IN ITEMS IMPORTED_LOCATION IMPORTED_SONAME INTERFACE_LINK_LIBRARIES)
    get_target_property(_deltanet_value deltanet::${DELTANET_KIND} ${_deltanet_property})
    if(_deltanet_value)
        set_target_properties(deltanet_library PROPERTIES ${_deltanet_property} "${_deltanet_value}")
    endif()
endforeach()

function(deltanet_into_ggml_cuda)
    set(replaced FALSE)
    # llama.cpp's backend is a target of its own, ik_llama.cpp's a part of ggml.
    foreach(target IN ITEMS ggml-cuda ggml)
        if(NOT TARGET ${target})
            continue()
        endif()
        get_target_property(sources ${target} SOURCES)
        foreach(name IN ITEMS gated_delta_net.cu delta-net.cu)
            set(theirs ${sources})
            list(FILTER theirs INCLUDE REGEX "ggml-cuda/${name}$")
            if(NOT theirs)
                continue()
            endif()
            list(REMOVE_ITEM sources ${theirs})
            list(APPEND sources "${DELTANET_GGML_CUDA}/${name}")
            set_target_properties(${target} PROPERTIES SOURCES "${sources}")
            get_filename_component(headers "${theirs}" DIRECTORY)
            get_target_property(include deltanet::${DELTANET_KIND} INTERFACE_INCLUDE_DIRECTORIES)
            set_source_files_properties("${DELTANET_GGML_CUDA}/${name}" TARGET_DIRECTORY ${target}
                PROPERTIES INCLUDE_DIRECTORIES "${headers};${include}")
            target_link_libraries(${target} PRIVATE deltanet_library)
            if(DELTANET_KIND STREQUAL "static")
                # libdeltanet is a plugin too and has entry points of these names.
                if(GGML_BACKEND_DL OR name STREQUAL "delta-net.cu")
                    message(FATAL_ERROR "deltanet: DELTANET_KIND must be shared for ik_llama.cpp and with GGML_BACKEND_DL: "
                        "both define functions that libdeltanet.a has too")
                endif()
                target_link_options(${target} PRIVATE LINKER:--exclude-libs,libdeltanet.a)
            endif()
            message(STATUS "deltanet: ${theirs} is replaced by ${DELTANET_GGML_CUDA}/${name}")
            set(replaced TRUE)
        endforeach()
    endforeach()
    if(NOT replaced)
        message(WARNING "deltanet: there is no CUDA backend with a gated delta net here (is GGML_CUDA on?)")
    endif()
endfunction()
cmake_language(DEFER CALL deltanet_into_ggml_cuda)
