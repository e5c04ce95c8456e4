"""What Triton does not ask of NVIDIA's driver (CUDA Driver API, "Execution Control")."""

import ctypes

PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # of CUfunction_attribute


def prefer_shared_memory(function: int, percent: int) -> None:
    """Have a processor give this share of its fast memory to a kernel's programs, and the rest to its cache.

    `function` is the kernel's handle. A kernel that needs more gets more. By default each kernel gets the share that
    its programs can use. A processor changes the share only when no program runs on it. Raises RuntimeError.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_SHARED_MEMORY_CARVEOUT, percent)
    if failed:
        raise RuntimeError(f"cuFuncSetAttribute failed with error {failed}")
