# code_objects/<arch>/<op>.co for every operator in hip/ops and every architecture in WAVE64_ARCHS.
#
# gfx*: by ROCm's clang where there is one, else by the clang in PyPI's ziglang. sm_*: cubins by nvcc, for development.
# Where a compiler is missing the build goes on, and code_objects/missing.txt says for which architectures and why.
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/pysrc/wave64/arch.py --hip-targets
                OUTPUT_VARIABLE default_archs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(WAVE64_ARCHS "" CACHE STRING "architectures to compile code objects for; empty: all of pysrc/wave64/arch.py")
if(NOT WAVE64_ARCHS)  # not the cache's default, which would outlive a change of the table
    set(WAVE64_ARCHS "${default_archs}")
endif()

find_program(WAVE64_CLANG NAMES clang PATHS $ENV{ROCM_PATH}/llvm/bin /opt/rocm/llvm/bin NO_DEFAULT_PATH
             DOC "clang with the amdgcn target; ld.lld lies beside it")
find_program(WAVE64_NVCC NAMES nvcc)
execute_process(COMMAND ${Python_EXECUTABLE} -m ziglang version RESULT_VARIABLE no_ziglang OUTPUT_QUIET ERROR_QUIET)

if(WAVE64_CLANG)
    get_filename_component(clang_folder ${WAVE64_CLANG} DIRECTORY)
    set(device_clang ${WAVE64_CLANG})
    set(device_lld ${clang_folder}/ld.lld)
elseif(NOT no_ziglang)
    set(device_clang ${Python_EXECUTABLE} -m ziglang clang)
    set(device_lld ${Python_EXECUTABLE} -m ziglang ld.lld)
endif()

set(outputs "")
set(missing "")
foreach(arch IN LISTS WAVE64_ARCHS)
    if(arch MATCHES "^gfx" AND NOT device_clang)
        string(APPEND missing "${arch}: no ROCm clang and no ziglang package when wave64 was built\n")
        continue()
    elseif(arch MATCHES "^sm_" AND NOT WAVE64_NVCC)
        string(APPEND missing "${arch}: no nvcc when wave64 was built\n")
        continue()
    elseif(NOT arch MATCHES "^(gfx|sm_)")
        message(FATAL_ERROR "WAVE64_ARCHS: expected names such as gfx942 or sm_90, separated by ';', got '${arch}'")
    endif()
    if(arch MATCHES "^gfx")  # a compiler of an older ROCm knows fewer architectures
        execute_process(COMMAND ${device_clang} --target=amdgcn-amd-amdhsa -mcpu=${arch} -nogpulib -x c -c /dev/null
                                -o ${CMAKE_BINARY_DIR}/probe.o RESULT_VARIABLE unknown OUTPUT_QUIET ERROR_QUIET)
        if(unknown)
            string(APPEND missing "${arch}: the clang that wave64 was built with does not know it\n")
            continue()
        endif()
    endif()
    set(folder ${CMAKE_BINARY_DIR}/code_objects/${arch})
    file(MAKE_DIRECTORY ${folder})
    foreach(source IN LISTS hip_ops)
        get_filename_component(op ${source} NAME_WE)
        set(output ${folder}/${op}.co)
        # Sources are named relative to hip/ and no hash of paths goes in, so that the same bytes come out anywhere.
        if(arch MATCHES "^gfx")
            add_custom_command(
                OUTPUT ${output}
                COMMAND ${device_clang} -x hip --offload-arch=${arch} --cuda-device-only --no-gpu-bundle-output -nogpulib
                        -nogpuinc -fuse-cuid=none -O3 -std=c++17 -Wall -Iinclude -c -emit-llvm -o ${folder}/${op}.bc
                        ops/${op}.hip
                COMMAND ${device_clang} --target=amdgcn-amd-amdhsa -mcpu=${arch} -nogpulib -O3 -c -o ${folder}/${op}.o
                        ${folder}/${op}.bc
                COMMAND ${device_lld} -shared -o ${output} ${folder}/${op}.o
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

if(missing)
    message(WARNING "wave64 is built without code objects for\n${missing}")
endif()
file(WRITE ${CMAKE_BINARY_DIR}/code_objects/missing.txt "${missing}")
install(FILES ${CMAKE_BINARY_DIR}/code_objects/missing.txt DESTINATION wave64/code_objects)
