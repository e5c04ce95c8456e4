"""cuBLAS repeats its results only with a fixed workspace, which it reads once, before its first product."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
