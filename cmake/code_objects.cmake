# code_objects/<arch>/<op>.co for every operator in hip/ops and every architecture in WAVE64_ARCHS.
#
# gfx*: per architecture by the first compiler that can: a ROCm's clang, newest last in cmake/device_compilers.cmake's
# order, else the clang in PyPI's ziglang. sm_*: cubins by nvcc, for development. Where none can the build goes on:
# code_objects/missing.txt says for which architectures and why, compilers.txt which compiler served the others.
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/pysrc/wave64/arch.py --hip-targets
                OUTPUT_VARIABLE default_archs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(WAVE64_ARCHS "" CACHE STRING "architectures to compile code objects for; empty: all of pysrc/wave64/arch.py")
if(NOT WAVE64_ARCHS)  # not the cache's default, which would outlive a change of the table
    set(WAVE64_ARCHS "${default_archs}")
endif()
find_program(WAVE64_NVCC NAMES nvcc)
include(${CMAKE_CURRENT_LIST_DIR}/device_compilers.cmake)

set(outputs "")
set(missing "")
set(served "")
foreach(arch IN LISTS WAVE64_ARCHS)
    if(arch MATCHES "^gfx")
        choose_device_compiler(${arch} compiler words)
        if(compiler STREQUAL "")
            string(APPEND missing "${arch}: ${words}\n")
            continue()
        endif()
        string(APPEND served "${arch}: ${words}\n")
    elseif(arch MATCHES "^sm_" AND NOT WAVE64_NVCC)
        string(APPEND missing "${arch}: no nvcc when wave64 was built\n")
        continue()
    elseif(NOT arch MATCHES "^sm_")
        message(FATAL_ERROR "WAVE64_ARCHS: expected names such as gfx942 or sm_90, separated by ';', got '${arch}'")
    endif()
    set(folder ${CMAKE_BINARY_DIR}/code_objects/${arch})
    file(MAKE_DIRECTORY ${folder})
    foreach(source IN LISTS hip_ops)
        get_filename_component(op ${source} NAME_WE)
        set(output ${folder}/${op}.co)
        if(arch MATCHES "^gfx")
            device_commands(${compiler} ${arch} ${op} ${folder})
            add_custom_command(
                OUTPUT ${output}
                COMMAND ${to_bitcode}
                COMMAND ${to_object}
                COMMAND ${to_code_object}
                DEPENDS ${source} ${hip_headers} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}/hip VERBATIM)
        else()
            add_custom_command(
                OUTPUT ${output}
                COMMAND ${WAVE64_NVCC} -x cu -cubin -arch=${arch} -O3 -std=c++17 -Iinclude -o ${output} ops/${op}.hip
                DEPENDS ${source} ${hip_headers} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}/hip VERBATIM)
        endif()
        list(APPEND outputs ${output})
    endforeach()
    install(DIRECTORY ${folder} DESTINATION wave64/code_objects FILES_MATCHING PATTERN "*.co")
endforeach()
add_custom_target(code_objects ALL DEPENDS ${outputs})

if(served)
    message(STATUS "Code objects are compiled by\n${served}")
endif()
if(missing)
    message(WARNING "wave64 is built without code objects for\n${missing}")
endif()
file(WRITE ${CMAKE_BINARY_DIR}/code_objects/missing.txt "${missing}")
file(WRITE ${CMAKE_BINARY_DIR}/code_objects/compilers.txt "${served}")
install(FILES ${CMAKE_BINARY_DIR}/code_objects/missing.txt ${CMAKE_BINARY_DIR}/code_objects/compilers.txt
        DESTINATION wave64/code_objects)
