"""Runs the project's CUDA kernels on the CPU, to test them where there is no GPU. Used by tests only.

``build.py`` compiles the sources of ``llmapi/_kernels/csrc`` as they are with g++, against headers that stand for
CUDA's (``include/``); ``runtime.cpp`` runs a launch, one fiber for each thread; ``gpu.py`` has
:class:`~tests.emulator.gpu.EmulatedGpu`, which takes the place of :class:`llmapi._kernels.gpu.Gpu`.
docs/kernels/README.md says what is emulated and what is not.
"""
