# Builds csrc/ for 64-bit Arm on another machine and runs its tests, which are static, under qemu; no CUDA.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(ARM_COMPILER aarch64-linux-gnu-g++)
find_program(ARM_EMULATOR NAMES qemu-aarch64-static qemu-aarch64)
if(NOT ARM_COMPILER OR NOT ARM_EMULATOR)
  message(FATAL_ERROR "The tests for 64-bit Arm need a cross compiler and an emulator: "
                      "install the packages g++-aarch64-linux-gnu and qemu-user-static (names in Debian and Ubuntu).")
endif()
set(CMAKE_CXX_COMPILER ${ARM_COMPILER})
set(CMAKE_CROSSCOMPILING_EMULATOR ${ARM_EMULATOR})
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CUDA_COMPILER NOTFOUND)
